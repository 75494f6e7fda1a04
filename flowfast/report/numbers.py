"""Numbers as a reader wants them: three digits, thousands apart, powers of ten written out."""

from __future__ import annotations

import math

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, digits: int = 3) -> str:
    """`value` with so many significant digits: 0.0871, 12,300, 1.2 x 10^-7 in typographic form."""
    value = float(value)
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if value < 0:
        return f"−{number(-value, digits)}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = int(exponent)
    if -4 < power < 6:
        decimals = max(0, digits - 1 - power)
        return f"{float(f'{value:.{digits - 1}e}'):,.{decimals}f}"
    return f"{mantissa} × 10{str(power).translate(SUPERSCRIPTS)}"


def short(value: float) -> str:
    """Like `number` without trailing zeros: 1, 0.75, 0.0115; for times and settings."""
    mantissa, times, power = number(value).partition(" ×")
    return (mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa) + times + power


def power_of_ten(value: float) -> str:
    """A tick at a power of ten: 0.01, 1, 100 near one, 10^-4 in typographic form further off."""
    power = round(math.log10(value)) if value > 0 else 0
    return f"{value:g}" if -3 < power < 4 else f"10{str(power).translate(SUPERSCRIPTS)}"


def seconds(value: float) -> str:
    """A duration: 1.93 ms, 4.50 s, 2 min 05 s."""
    if value < 0.9995:
        return f"{number(1000 * value)} ms"
    if value < 99.5:
        return f"{number(value)} s"
    return f"{round(value) // 60} min {round(value) % 60:02d} s"


def percent(value: float) -> str:
    """A share: 93.4 %."""
    return f"{100 * value:.1f} %"
