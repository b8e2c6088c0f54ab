"""What `import bitfold` gives, and what it costs."""

import subprocess
import sys

import bitfold as bf


def test_importing_is_light() -> None:
    script = (
        "import sys, torch; before = set(sys.modules); import bitfold; new = set(sys.modules) - before;"
        "heavy = ('triton', 'transformers', 'torch._inductor', 'torch._dynamo', 'networkx', "
        "'bitfold.passes', 'bitfold.lowering', 'bitfold.tools');"
        "print([name for name in new if name.startswith(heavy)]);"
        "print(torch.ops.bitfold.dequantize, torch.ops.bitfold.cpu_linear, torch.ops.bitfold.fused)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[0] == "[]" and "dequantize" in out.stdout


def test_every_public_name_is_there() -> None:
    for name in bf.__all__:
        assert getattr(bf, name) is not None, name
    assert set(bf.__all__) <= set(dir(bf))
    assert "lower" in str(bf.Pipeline.parse("fuse,lower{target=reference}"))


def test_the_backend_is_found_without_an_import() -> None:
    script = "import sys, torch._dynamo as d; print('bitfold' in d.list_backends(), 'bitfold' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["True", "False"]
