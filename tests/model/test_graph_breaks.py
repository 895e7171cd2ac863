import subprocess
import sys

PROGRAM = """
import sys

import torch
import lumina_ds.engine.kernel_choice
import lumina_ds.model.transformer
from lumina_ds.model.graph_breaks import outside_graphs

assert "torch._dynamo" not in sys.modules, "naming a model costs the import of torch.compile"

def double(x):
    return 2 * x if x.sum() > 0 else x  # a choice by value, which a graph cannot hold

def between(f):
    return lambda x: f(x + 1) + 1

x = torch.ones(3)
from torch._dynamo.testing import CompileCounter
seen = CompileCounter()
compiled = torch.compile(between(outside_graphs(double)), backend=seen)
assert compiled(x).tolist() == [5, 5, 5]
print(seen.frame_count, seen.op_count)
"""


def test_torch_compile_is_not_imported_for_a_model_and_still_breaks_there():
    """Two graphs, of one sum each: what is outside them was not traced."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "2"]
