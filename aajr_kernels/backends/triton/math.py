"""Elementary functions of float32 in Triton: polynomials, one division, and nothing that cancels in a tail.

The compiler's own ``exp`` multiplies by log2(e) first and loses digits in proportion to the argument; its ``tanh`` and
``erf`` need a library that the interpreter does not have. These are the project's own (csrc/cpu/math.h), with the same
errors, in units in the last place: exp 1.5, log 1, sigmoid and its complement 4, tanh 4, its slope 7, normal density 3,
its cumulative function 10. NaN gives NaN, infinities give the limits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _power_of_two(n):
    """2 to the power of integers from -126 to 127."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _exp_of_rest(r):
    """e^r for |r| < ln 2 / 2."""
    p = r * 0.0013926184037700295 + 0.00835720356553793
    p = p * r + 0.041666556149721146
    p = p * r + 0.16666631400585175
    p = p * r + 0.5
    p = p * r + 1.0
    return p * r + 1.0


@triton.jit
def _exp_of_sum(x, tail):
    """e^(x + tail), where |tail| < 1 holds what x could not; without the check for NaN."""
    bounded = tl.minimum(tl.maximum(x, -104.0), 89.0)
    # n = round(x / ln 2): the addition pushes the fraction out of the mantissa
    shifted = (bounded + tail) * 1.44269504088896341 + 12582912.0
    n = shifted - 12582912.0
    r = (bounded - n * 0.693359375) + n * 2.12194440e-4 + tail
    p = _exp_of_rest(r)
    # 2^n in two factors, since n reaches 128 and -150
    whole = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    half = whole >> 1
    return p * _power_of_two(half) * _power_of_two(whole - half)


@triton.jit
def exp(x):
    """e^x: 0 for x < -104 and -inf, inf above 88.73; subnormal results are kept."""
    return tl.where(x == x, _exp_of_sum(x, 0.0), x)


@triton.jit
def exp_flushed(x):
    """e^x for x < 88, as a softmax needs it: subnormal results are zero. Less work than :func:`exp`."""
    tiny = x < -87.33
    bounded = tl.where(tiny, -87.33, x)
    shifted = bounded * 1.44269504088896341 + 12582912.0
    n = shifted - 12582912.0
    r = (bounded - n * 0.693359375) + n * 2.12194440e-4
    p = _exp_of_rest(r)
    return tl.where(tiny, 0.0, p * _power_of_two(shifted.to(tl.int32, bitcast=True) - 0x4B400000))


@triton.jit
def log(x):
    """Natural logarithm: -inf at 0, NaN below; subnormal arguments count."""
    tiny = x < 1.1754943508222875e-38
    bits = tl.where(tiny, x * 33554432.0, x).to(tl.int32, bitcast=True)
    # x = 2^e (1 + f) with 1 + f between the roots of 1/2 and 2
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    n = e.to(tl.float32) - tl.where(tiny, 25.0, 0.0)
    p = f * 0.06749539077281952 - 0.11670182645320892
    p = p * f + 0.1188347116112709
    p = p * f - 0.12406208366155624
    p = p * f + 0.14220362901687622
    p = p * f - 0.16667990386486053
    p = p * f + 0.2000207155942917
    p = p * f - 0.25000008940696716
    p = p * f + 0.3333331346511841
    square = f * f
    small = (square * f) * p - n * 2.12194440e-4
    result = n * 0.693359375 + (f + (small - 0.5 * square))
    limit = tl.where(x == 0.0, float("-inf"), tl.where(x > 0.0, x, float("nan")))
    return tl.where((x > 0.0) & (x < float("inf")), result, limit)


@triton.jit
def sigmoid(x):
    """The logistic function at x and at -x, both to full relative accuracy: what 1 - p would lose is not lost."""
    e = exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    negative = x < 0.0
    return tl.where(negative, small, large), tl.where(negative, large, small)


@triton.jit
def tanh(x):
    """tanh x and its derivative 1 - tanh², the latter from e^(-2|x|) since the difference would cancel."""
    a = tl.abs(x)
    square = a * a
    e = exp(-2.0 * a)
    r = 1.0 / (1.0 + e)
    p = square * -0.005897966679185629 + 0.02079862542450428
    p = p * square - 0.05378471687436104
    p = p * square + 0.13331936299800873
    p = p * square - 0.33333298563957214
    t = tl.where(a < 0.6, a + a * (square * p), (1.0 - e) * r)
    sign = x.to(tl.int32, bitcast=True) ^ a.to(tl.int32, bitcast=True)
    return (t.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True), 4.0 * e * (r * r)


@triton.jit
def normal(x):
    """The normal distribution Φ(x) and its density φ(x).

    The lower tail is φ times Mills' ratio (1 - Φ)/φ, a rational function of |x| with positive coefficients: full
    relative accuracy down to the subnormal numbers.
    """
    a = tl.minimum(tl.abs(x), 15.0)
    # a² in two parts, the first exact: an error in it is multiplied by up to 100
    head = (a.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    density = 0.398942280401432678 * _exp_of_sum(-0.5 * (head * head), -0.5 * ((a - head) * (a + head)))
    p = a * 0.010410534217953682 + 0.10247459262609482
    p = p * a + 0.4611464738845825
    p = p * a + 1.1011288166046143
    p = p * a + 1.2533141374588013
    q = a * 0.010410422459244728 + 0.1024807021021843
    q = q * a + 0.47141292691230774
    q = q * a + 1.205557107925415
    q = q * a + 1.676458716392517
    q = q * a + 1.0
    tail = density * (p / q)
    cdf = tl.where(x < 0.0, tail, 1.0 - tail)
    known = x == x
    return tl.where(known, cdf, x), tl.where(known, density, x)
