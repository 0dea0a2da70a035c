#include "../cpu/math_eval.h"

#include "../dispatch.h"
#include "../registry.h"

namespace aajr {
namespace {

void math_eval(const Args& a) {
  check_count(a, 2, 1, 0);
  const View &x = a.tensors[0], &y = a.tensors[1];
  for (const View* v : {&x, &y}) {
    if (!*v || v->dim != 1) fail("x and y must be vectors.");
    check_dtype(*v, "x and y", DType::f32);
    check_contiguous(*v, "x and y");
  }
  check_shape(y, "y", {x.size[0]});
  if (a.ints[0] < 0 || a.ints[0] >= static_cast<int64_t>(MathFunction::count)) fail("function must name one.");
  AAJR_SELECT(math_kernels).eval(static_cast<MathFunction>(a.ints[0]), x.as<float>(), y.as<float>(), x.size[0]);
}

const Register register_eval("math_eval",
                             "For tests. tensors: x, y; ints: function (8 exp_flushed, 0 exp, 1 log, 2 sigmoid, 3 its complement, "
                             "4 tanh, 5 its slope, 6 normal cdf, 7 normal density)",
                             math_eval);

}  // namespace
}  // namespace aajr
