"""What a pipeline made of a model, in words: the worst first, each with what to try; then the tree of
modules.

In: an `Inspection`. Out: an `Explanation`, which prints on a terminal.

    explain(inspect(model, pipeline, inputs))
    1  layers.3.down: 4.1 % of the values of its input lie beyond the scale; ...
       try: calibrate on data like what it will see ...
    ...
    layers.{0..29}   int4[g64]   4.25 bits   cpu, C++   22.1 dB   71 % of the time
"""

from .explanation import Explanation, explain
from .finding import Finding

__all__ = ["Explanation", "Finding", "explain"]
