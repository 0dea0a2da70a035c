// The functions of math.h over arrays, so that their errors can be measured.
#include "math.h"

#include "math_eval.h"

namespace aajr {
namespace AAJR_ARCH {
namespace {

AAJR_INLINE vf value(MathFunction f, vf x) {
  switch (f) {
    case MathFunction::exp: return exp(x);
    case MathFunction::log: return log(x);
    case MathFunction::sigmoid: return sigmoid(x).p;
    case MathFunction::sigmoid_complement: return sigmoid(x).rest;
    case MathFunction::tanh: return tanh(x).t;
    case MathFunction::tanh_slope: return tanh(x).slope;
    case MathFunction::normal_cdf: return normal(x).cdf;
    case MathFunction::normal_density: return normal(x).density;
    case MathFunction::exp_flushed: return exp_flushed(x);
    case MathFunction::count: break;
  }
  return x;
}

void eval(MathFunction f, const float* x, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(y + i, value(f, load(x + i)));
  if (i < n) store_part(y + i, value(f, load_part(x + i, n - i)), n - i);
}

}  // namespace

const MathKernels& math_kernels() {
  static const MathKernels kernels{eval};
  return kernels;
}

}  // namespace AAJR_ARCH
}  // namespace aajr
