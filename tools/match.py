"""Engines in processes of their own, taking turns: while one works the other waits."""

import contextlib
import importlib.util
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable

import torch

from minillm.errors import UserError
from minillm.memory import peak_mib, reset_peak
from tools.engines import Ours, Setup

# of the norm: logits of 32 layers in bf16 are 6 % off the exact ones
TOLERANCES_16_BITS = {"logits": 0.1, "loss": 0.01}
TOLERANCES_FP32 = {"logits": 1e-3, "loss": 1e-3}


class Worker:
    """An engine in a process of its own: `ask` runs one of its methods there and waits."""

    def __init__(self, engine: str, setup: Setup):
        self.engine = engine
        context = multiprocessing.get_context("spawn")
        self.here, there = context.Pipe()
        self.process = context.Process(target=_work, args=(there, engine, setup), daemon=True)
        self.process.start()
        there.close()

    def ask(self, method: str, *arguments):
        """What the engine's method returns. Errors: UserError with the other side's own line."""
        try:
            self.here.send((method, arguments))
            error, answer = self.here.recv()
        except (EOFError, OSError):
            self.process.join(5)
            how = self.process.exitcode
            raise UserError(f"benchmark: the process of {self.engine} ended ({how}) in {method}; "
                            "-9 is lack of memory: lower the sizes") from None  # fmt: skip
        if error:
            raise UserError(f"benchmark: {self.engine}, {method}: {error}")
        return answer

    def close(self) -> None:
        """Ends the process and gives its memory back."""
        with contextlib.suppress(OSError):
            self.here.send(None)
        self.process.join()


def _work(pipe, engine: str, setup: Setup) -> None:
    """Answers calls until told to stop. Memory counts from after the imports of both sides'
    libraries, the optimizer's among them."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - its bars and warnings
    running = None
    while (call := pipe.recv()) is not None:
        method, arguments = call
        try:
            if method == "load":
                kind, device = Ours, torch.device(setup.device)
                if engine != "minillm":
                    from tools.peers import Peers as kind
                torch.optim.AdamW([torch.zeros(1, device=device, requires_grad=True)])
                baseline = reset_peak(device)
                running, answer = kind(setup), None
            elif method == "reset_peak":
                answer = reset_peak(device) - baseline
            elif method == "peak":
                answer = peak_mib(device) - baseline
            else:
                answer = getattr(running, method)(*arguments)
            pipe.send((None, answer))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            pipe.send((f"{type(error).__name__}: {error} ({where.name})", None))


def installed() -> list[str]:
    """minillm, and its peers where they are installed."""
    found = all(importlib.util.find_spec(name) for name in ("transformers", "peft"))
    return ["minillm", "transformers"] if found else ["minillm"]


class Match:
    """The engines on one setup, taking turns."""

    def __init__(self, setup: Setup):
        self.dtype = setup.dtype
        self.device = torch.device(setup.device)
        self.workers = {name: Worker(name, setup) for name in installed()}

    def __enter__(self) -> "Match":
        try:
            self.all("load")
            self.vocab_size, self.context = self.ours("facts")
            tokens = torch.randint(self.vocab_size, (24,)).tolist()
            self.agree("logits", tokens)
        except BaseException:
            self.__exit__()
            raise
        return self

    def agree(self, method: str, *arguments) -> None:
        """Errors: UserError unless all engines answer the same, but for rounding."""
        tolerances = TOLERANCES_FP32 if self.dtype == "fp32" else TOLERANCES_16_BITS
        ours, *others = (torch.as_tensor(x) for x in self.all(method, *arguments).values())
        for theirs in others:
            error = float((ours - theirs).norm() / theirs.norm())
            if not error <= tolerances[method]:  # NaN is not
                raise UserError(f"benchmark: the engines' {method} differ by {error:.1%}; they do "
                                "not do the same, so there is nothing to compare")  # fmt: skip

    def __exit__(self, *_) -> None:
        for worker in self.workers.values():
            worker.close()

    def ours(self, method: str, *arguments):
        """minillm's answer."""
        return self.workers["minillm"].ask(method, *arguments)

    def all(self, method: str, *arguments) -> dict:
        """One answer of each, one after the other."""
        return {name: worker.ask(method, *arguments) for name, worker in self.workers.items()}

    def turns(
        self, repeats: int, method: str, *arguments, after: Callable[[], object] | None = None
    ) -> dict[str, list]:
        """A B A B: each one's answers, after a turn that does not count. `after` is called at the
        end of every turn."""
        answers = []
        for _ in range(repeats + 1):
            answers.append(self.all(method, *arguments))
            if after is not None:
                after()
        return {name: [answer[name] for answer in answers[1:]] for name in self.workers}
