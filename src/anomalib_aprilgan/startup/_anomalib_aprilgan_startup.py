"""Waits for anomalib's models and then makes AprilGAN known to them. Installed beside the package.

Run by every Python that starts in this environment (anomalib_aprilgan.pth), so it imports nothing
but what a starting Python has imported anyway. ``ANOMALIB_APRILGAN_NO_AUTOLOAD=1`` turns it off.
"""

import os
import sys

TYPE_CHECKING = False  # typing is not imported at start-up
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

AWAITED = "anomalib.models"
# Whether the package loads models only when they are asked for: for its commands, and where torch is missing.
is_light = False


class AwaitModels:
    """A finder that finds nothing itself: it lets the others find ``anomalib.models`` and registers after it."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> "ModuleSpec | None":  # noqa: ARG004  # the import system's signature
        """Spec of ``anomalib.models`` with a loader that registers AprilGAN when it is done."""
        if name != AWAITED:
            return None
        sys.meta_path.remove(AwaitModels)
        from importlib.util import find_spec

        spec = find_spec(name)
        # While `import anomalib_aprilgan` itself is what brought anomalib in, it registers at its own end.
        if spec is not None and spec.loader is not None and "anomalib_aprilgan" not in sys.modules:
            execute = spec.loader.exec_module

            def exec_module(module: "ModuleType") -> None:
                execute(module)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # this one loader object, once
        return spec


def install() -> None:
    """Begin to wait."""
    if os.environ.get("ANOMALIB_APRILGAN_NO_AUTOLOAD", "0") in {"", "0"}:
        sys.meta_path.insert(0, AwaitModels)


def _register() -> None:
    try:
        import anomalib_aprilgan  # noqa: F401  # registers itself
    except Exception as error:  # nothing of ours may break a Python that did not ask for it
        import warnings

        warnings.warn(f"anomalib_aprilgan could not be loaded into anomalib: {error!r}", stacklevel=2)


def command(*first: str) -> int:
    """The command ``anomalib-aprilgan``, or one of its subcommands, with the arguments of this process."""
    globals()["is_light"] = True
    from anomalib_aprilgan.command import main

    return main([*first, *sys.argv[1:]])


def quickstart() -> int:
    """The command ``anomalib-aprilgan-quickstart``, its name before there were subcommands."""
    return command("quickstart")


def benchmark() -> int:
    """The command ``anomalib-aprilgan-benchmark``, its name before there were subcommands."""
    return command("benchmark")


def config() -> int:
    """The command ``anomalib-aprilgan-config``, its name before there were subcommands."""
    return command("config")
