"""Compare every engine, in every variant, with the model of the state machine (machine.py).

The runs are short; ``check/stress_zcache`` runs as long as wanted.
"""

from typing import Any

from hypothesis import HealthCheck, settings

from tests.backends.engines import VARIANTS, check, least_limit, make, needs_native
from tests.backends.machine import ZcacheMachine
from tests.backends.pages import MIB


def machine(
    engine: str, limits: tuple[int, int, int], examples: int, steps: int, **options: object
) -> type[Any]:
    """Make a test case of the given number of runs and steps of the machine."""

    class Machine(ZcacheMachine):
        LIMITS = limits
        NATIVE = engine != "python"
        PAGE_SIZES = (*ZcacheMachine.PAGE_SIZES, *((MIB,) if engine != "python" else ()))

        def make(self) -> Any:  # noqa: ANN401  # one of two engine classes
            return make(engine, limits[0], **options)

        def check(self) -> None:
            check(self.z)

    case = Machine.TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return case


def native_machine(variant: str, examples: int) -> type[Any]:
    """Make a test case of the native engine, skipped if it was not built."""
    options = VARIANTS[variant]
    least = least_limit(options) * (2 if options.get("method") == "lz4hc" else 1)
    case = machine("log", (least, least + 100_000, 2 * least), examples, 60, **options)
    marked: type[Any] = needs_native(case)
    return marked


TestPython = machine("python", (MIB, MIB + 100_000, 2 * MIB), 50, 50)
TestLz4 = native_machine("lz4", 25)
TestLz4Checked = native_machine("lz4-checked", 8)
TestNone = native_machine("none", 12)
TestWasActive = native_machine("was-active", 12)
TestZbud = native_machine("zbud", 15)
TestLz4hc = native_machine("lz4hc", 8)
TestZstd = native_machine("zstd", 8)
TestZbudZstd = native_machine("zbud-zstd", 8)
TestZstdDict = native_machine("zstd-dict", 5)
