"""Which dtype a device computes in, and the autocast and gradient scaler that go with it."""

from dataclasses import dataclass

import torch

from minillm.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """A compute dtype on a device. fp32 needs neither autocast nor scaler; only fp16 the scaler."""

    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return DTYPES[self.name]

    def autocast(self) -> torch.autocast:
        """A context in which matrix products run in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.name != "fp32")

    def scaler(self) -> torch.amp.GradScaler:
        """Keeps small fp16 gradients from becoming zero; a pass-through in bf16 and fp32."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def choose_precision(name: str, device: torch.device | str) -> Precision:
    """`auto` takes bf16 where the device computes it natively, else fp16 on a GPU, else fp32.

    Native bf16: compute capability 8.0 or more, or a CPU with AVX512-BF16 or AMX. (A T4 says it
    supports bf16, and emulates it.) Errors: UserError for an unknown name.
    """
    device = torch.device(device)
    if name == "auto":
        name = "bf16" if has_native_bf16(device) else "fp16" if device.type == "cuda" else "fp32"
    if name not in DTYPES:
        raise UserError(f"precision {name!r} is unknown; choose auto, {', '.join(DTYPES)}")
    return Precision(name, device)


def has_native_bf16(device: torch.device) -> bool:
    """Whether bf16 products run in hardware here."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_device(name: str) -> torch.device:
    """`auto` takes the GPU if there is one. Errors: UserError for a device that is not here, or
    that this PyTorch has no code for."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("has no memory")
        torch.empty(1, device=device)  # asks nothing of the GPU's own code
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"device {name!r} is not available here; use --device cpu") from None
    if device.type == "cuda":
        _check_built_for(device)
    return torch.device("cpu") if device.type == "cpu" else device  # "cpu:0" would be another


def _check_built_for(device: torch.device) -> None:
    major, minor = torch.cuda.get_device_capability(device)
    kinds = ("sm_", "compute_")  # others, as AMD's, are not judged
    built = [arch for arch in torch.cuda.get_arch_list() if arch.startswith(kinds)]
    if built and not any(_runs(arch, major, minor) for arch in built):
        raise UserError(f"{device}: a GPU of capability {major}.{minor}, but this PyTorch is built "
                        f"for {', '.join(built)}; install one that is")  # fmt: skip


def _runs(arch: str, major: int, minor: int) -> bool:
    """sm_86 runs on capability 8.6 to 8.9; compute_80 is compiled on the spot for 8.0 and later."""
    kind, _, digits = arch.partition("_")
    digits = "".join(c for c in digits if c.isdigit())
    built = int(digits[:-1]), int(digits[-1])
    if kind == "sm":
        return built[0] == major and built[1] <= minor
    return built <= (major, minor)
