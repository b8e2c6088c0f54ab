"""Algorithms that decide more than rounding to the nearest does: codes, scales, balanced channels.

In the order in which they may stand in an algorithm:

    rotate                     the whole model: the residual stream turned, so that no channel stands out
    awq, smooth, equalize      channels of a block balanced (balance.py: between which layers)
    follow                     weights moved to what the float model has behind what is rounded
    clip, hqq                  scales of one weight
    gptq, descend              codes of one weight
    refit                      scales of one weight again, for the codes that it has
    learn                      scales and rounding of a block together, by gradients
    tune                       scales and vectors of the whole model, by gradients
    correct_bias               biases that take off the mean error

and what they are made of: `solve.py` is what a solver sees and gives (`Task` -> `draft.py`), `on_model.py`
the places of passes that work on blocks or the whole model, `inputs.py` the statistics of what goes into a
layer, `moments.py` what is computed of them, `columns.py` where columns are rounded one after the other,
`rounding.py` what gradients learn of a rounding, `residual.py` where a model's residual stream is.
"""
