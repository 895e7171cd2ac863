"""What torch.compile must not trace: `torch.compiler.disable`, without its price where nothing is compiled.

torch.compiler.disable imports torch._dynamo where it decorates, 2 CPU seconds in every process that names a model.
torch's own decorator for its optimizers, which DeepSpeed uses too, waits with that until the first call.
"""

from collections.abc import Callable
from typing import Any

from torch._compile import _disable_dynamo


def outside_graphs(function: Callable[..., Any]) -> Any:
    """The function as a break of every compiled graph; what it calls is not traced either."""
    return _disable_dynamo(function)
