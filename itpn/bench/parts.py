"""Which part of a training step the time on a clock belongs to."""

from typing import Any

from torch import Tensor, nn

from itpn.engine.clock import Clock


class Parts:
    """Names the parts of a forward pass, each without those inside it, and of the backward pass behind it.

    Args:
        rest: what is in none of the forward pass's named parts.
    """

    def __init__(self, clock: Clock, rest: str) -> None:
        self.clock = clock
        self.open = [rest]

    def module(self, module: nn.Module, name: str) -> None:
        """All calls of a module are a part of that name."""
        module.register_forward_pre_hook(lambda *_: self._enter(name))
        module.register_forward_hook(lambda *_: self._leave())

    def method(self, owner: Any, method: str, name: str) -> None:
        """The same of one of an object's methods."""
        call = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._enter(name)
            result = call(*args, **kwargs)
            self._leave()
            return result

        setattr(owner, method, timed)

    def backward(self, module: nn.Module, name: str) -> None:
        """The backward pass is of that name until it comes to one of a module's outputs, a tuple of tensors.

        Autograd takes what was done last first, so all that follows the module has been gone through then.
        """

        def watch(_module: nn.Module, _args: Any, outputs: tuple[Tensor, ...]) -> None:
            waiting = [name]

            def arrived(_grad: Tensor) -> None:
                if waiting:
                    self.clock.mark(waiting.pop())

            for output in outputs:
                output.register_hook(arrived)  # type: ignore[no-untyped-call]

        module.register_forward_hook(watch)

    def _enter(self, name: str) -> None:
        self.clock.mark(self.open[-1])
        self.open.append(name)

    def _leave(self) -> None:
        self.clock.mark(self.open.pop())
