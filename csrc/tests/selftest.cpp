// aajr_selftest [capability...]: every kernel on small problems, compared with the baseline's results.
//
// Without arguments, all capabilities that run here. A program of its own, without Python, so that it runs on bare
// machines and in emulators of processors. `--expect NAME` fails unless NAME is what dispatch chooses by itself,
// `--threads N` (2) shares the work, `--callers N` (1) call every kernel at the same time, each with tensors of its own. Prints a line for each kernel; the exit status is 0 if all passed.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <exception>
#include <string>
#include <thread>
#include <vector>

#include "../dispatch.h"
#include "problem.h"

namespace {

using namespace aajr;
using selftest::Run;

struct Problem {
  const char* name;
  void (*run)(Run&);
  bool low = true;  // for the 16-bit types too
};

void math_functions(Run& r) {
  const View x = r.random({203}, DType::f32, 4.0f);
  for (int64_t function = 0; function < 8; ++function) {
    const View positive = r.random({203}, DType::f32);
    for (int i = 0; i < 203; ++i) positive.as<float>()[i] = 0.01f + std::fabs(positive.as<float>()[i]);
    r.call("math_eval", {function == 1 ? positive : x, r.result("function", {203}, DType::f32)}, {function});
  }
}

template <bool CENTRED>
void norm(Run& r) {
  const int64_t rows = 5, size = 83, stacks = 3;
  const View x = r.random({stacks, rows, size}), weight = r.random({size}), none;
  const View bias = CENTRED ? r.random({size}) : none, residual = CENTRED ? none : r.random({stacks, rows, size});
  const View summed = CENTRED ? none : r.result("sum", {stacks, rows, size});
  const View y = r.result("y", {stacks, rows, size});
  const View stats = r.result("stats", {CENTRED ? 2 * stacks : stacks, rows}, DType::f32);
  r.call("norm_fwd", {x, y, stats, weight, bias, residual, summed}, {CENTRED}, {1e-5, CENTRED ? 0.0 : 1.0});
  const View y_bar = r.random({stacks, rows, size}), x_bar = r.result("x_bar", {stacks, rows, size});
  const View w_bar = r.result("w_bar", {size}, DType::f32);
  const View b_bar = CENTRED ? r.result("b_bar", {size}, DType::f32) : none;
  r.call("norm_bwd", {y_bar, CENTRED ? x : summed, weight, stats, x_bar, w_bar, b_bar, none}, {CENTRED},
         {CENTRED ? 0.0 : 1.0});
}

void pointwise(Run& r) {
  for (int64_t kind = 0; kind < 8; ++kind) {
    const View x = r.random({3, 7, 37}), y_bar = r.random({3, 7, 37});
    r.call("pointwise_fwd", {x, r.result("y", {3, 7, 37})}, {kind});
    r.call("pointwise_bwd", {x, y_bar, r.result("x_bar", {3, 7, 37})}, {kind});
  }
}

void gated(Run& r) {
  for (int64_t kind = 0; kind < 3; ++kind) {
    const View gate = r.random({2, 7, 37}), up = r.random({2, 7, 37}), h_bar = r.random({2, 7, 37});
    r.call("gated_fwd", {gate, up, r.result("h", {2, 7, 37})}, {kind});
    r.call("gated_bwd", {gate, up, h_bar, r.result("gate_bar", {2, 7, 37}), r.result("up_bar", {2, 7, 37})}, {kind});
  }
}

void sensitivity(Run& r) {
  const View y = r.random({3, 5, 71}), q_bar = r.random({2, 5}, DType::f32);
  for (int64_t metric = 0; metric < 3; ++metric) {
    r.call("sensitivity_fwd", {y, r.result("q", {2, 5}, DType::f32)}, {metric});
    r.call("sensitivity_bwd", {y, q_bar, r.result("y_bar", {3, 5, 71})}, {metric});
  }
  r.call("softmax_fwd", {y, r.result("softmax", {3, 5, 71})});
  r.call("softmax_bwd", {y, r.random({3, 5, 71}), r.result("softmax x_bar", {3, 5, 71})});
}

void head(Run& r) {
  const int64_t stacks = 3, tokens = 5, size = 36, words = 131;
  for (int64_t metric = 0; metric < 4; ++metric) {
    const View h = r.random({stacks, tokens, size}), weight = r.random({words, size}, 0.25f), bias = r.random({words});
    const View labels = r.integers({3, 130, -100, 0, 64}), nll = r.result("nll", {tokens}, DType::f32);
    const View stats = r.result(nullptr, {2 + 4 * (stacks - 1), tokens}, DType::f32);
    const double cap = metric % 2 ? 5.0 : 0.0;
    const View kept;
    r.call("head_fwd", {h, weight, bias, labels, stats, nll, kept}, {metric, -100}, {0.5, cap});
    const View q_bar = r.random({stacks - 1, tokens}, DType::f32), nll_bar = r.random({tokens}, DType::f32);
    r.call("head_bwd",
           {h, weight, bias, labels, stats, q_bar, nll_bar, r.result("h_bar", {stacks, tokens, size}),
            r.result("w_bar", {words, size}), r.result("b_bar", {words}, DType::f32), kept},
           {metric, -100, 0}, {0.5, cap});
  }
}

void rotary(Run& r) {
  for (int64_t interleaved = 0; interleaved < 2; ++interleaved) {
    const View x = r.random({2, 2, 5, 3, 40}), cos = r.random({5, 1, 36}), sin = r.random({5, 1, 36});
    r.call("rotary", {x, r.result("y", {2, 2, 5, 3, 40}), cos, sin}, {interleaved, 0});
    const View y_bar = r.random({2, 2, 5, 3, 40}), x_bar = r.result("x_bar", {2, 2, 5, 3, 40});
    r.call("rotary", {y_bar, x_bar, cos, sin}, {interleaved, 1});
    const View cos_bar = r.result("cos_bar", {5, 1, 36}, DType::f32);
    r.call("rotary_tables", {y_bar, x, cos_bar, r.result("sin_bar", {5, 1, 36}, DType::f32)}, {interleaved});
  }
}

void linear(Run& r) {
  const View product = r.random({3, 7, 83}, DType::f32), y = r.result("y", {3, 7, 83});
  r.call("linear_bias", {product, y, r.random({83})});
  r.call("column_sum", {y, r.result("sum", {83})});
}

struct Attention {
  int64_t b = 1, h = 2, hk = 1, n = 33, m = 33, d = 32, v = 32;
  int tangents = 1, k_tangents = 1;
  bool causal = false;
  int64_t offset = 0, window = 0;
  double softcap = 0.0, dropout = 0.0;
  int mask = 0;  // 1: boolean, 2: bias with tangents
  bool packed = false;
  int64_t context = 0;  // keys before the others
  float shift = 0.0f;  // added to the tangents of the scores, but for their scale
};

void attend(Run& r, const Attention& a) {
  const int64_t s = 1 + a.tangents;
  const View q = r.random({s, a.b, a.h, a.n, a.d}), k = r.random({1 + a.k_tangents, a.b, a.hk, a.m, a.d});
  const View v = r.random({s, a.b, a.hk, a.m, a.v}), none;
  if (a.shift != 0.0f) {
    Run::fill(q, q.stride[0], q.stride[0], a.d, a.shift);
    Run::fill(k, 0, k.stride[0], a.d, 1.0f);
  }
  const int64_t stacks = a.mask == 2 ? s : 1;
  View mask;
  const int64_t columns = a.context + a.m;
  if (a.mask == 1) mask = r.booleans({1, a.b, 1, a.n, columns});
  if (a.mask == 2) mask = r.random({stacks, 1, a.h, a.n, columns});
  const View starts = r.integers({0, 5, 5, a.n});
  const View cu = a.packed ? starts : none;
  const View shift = r.result("shift", {a.b, a.h, a.n}, DType::f32), norm = r.result("norm", {a.b, a.h, a.n}, DType::f32);
  const View mu = r.result("mu", {a.tangents, a.b, a.h, a.n}, DType::f32), out = r.result("out", {s, a.b, a.h, a.n, a.v});
  const std::initializer_list<int64_t> ints = {a.causal, a.offset, a.window, a.dropout > 0.0, 0};
  const std::initializer_list<double> floats = {0.25, a.softcap, a.dropout};
  const View keep = a.dropout > 0.0 ? r.booleans({a.b, a.h, a.n, columns}) : none;
  // after the tensors of every call: the mask of what is kept where weights are dropped, and the tensors of a context
  const auto call = [&](const char* name, std::vector<View> tensors, const std::vector<View>& of_context) {
    if (keep) tensors.push_back(keep);
    if (a.context) tensors.insert(tensors.end(), of_context.begin(), of_context.end());
    r.call(name, tensors, ints, floats);
  };
  const View context_k = a.context ? r.random({1, a.b, a.hk, a.context, a.d}) : none;
  const View context_v = a.context ? r.random({1, a.b, a.hk, a.context, a.v}) : none;
  call("attention_fwd", {q, k, v, mask, cu, cu, shift, norm, mu, out}, {context_k, context_v});
  const View out_bar = r.random({s, a.b, a.h, a.n, a.v});
  const View q_bar = r.result("q_bar", {s, a.b, a.h, a.n, a.d});
  const View k_bar = r.result("k_bar", {1 + a.k_tangents, a.b, a.hk, a.m, a.d});
  const View v_bar = r.result("v_bar", {s, a.b, a.hk, a.m, a.v});
  const View bias_bar = a.mask == 2 ? r.result("bias_bar", {stacks, 1, a.h, a.n, columns}, DType::f32, true) : none;
  std::vector<View> of_context{context_k, context_v};
  if (a.context) {
    of_context.push_back(r.result("context_k_bar", {1, a.b, a.hk, a.context, a.d}));
    of_context.push_back(r.result("context_v_bar", {1, a.b, a.hk, a.context, a.v}));
  }
  call("attention_bwd", {q, k, v, mask, cu, cu, shift, norm, mu, out, out_bar, q_bar, k_bar, v_bar, bias_bar},
       of_context);
}

// Every row's mu is about 100, and the tangent of the output is what is left of (P S')V - mu O.
void attention_large_mu(Run& r) {
  Attention a;
  a.shift = 400.0f;
  attend(r, a);
}
void attention_causal(Run& r) {
  Attention a;
  a.n = a.m = 65, a.d = a.v = 64, a.causal = true;
  attend(r, a);
}
void attention_odd(Run& r) {
  Attention a;
  a.b = 2, a.h = 4, a.hk = 2, a.n = 19, a.m = 37, a.d = 20, a.v = 12, a.tangents = a.k_tangents = 2;
  a.softcap = 3.0, a.mask = 2;
  attend(r, a);
}
void attention_long(Run& r) {
  Attention a;
  a.h = 1, a.n = 7, a.m = 530, a.d = 16, a.v = 48, a.causal = true, a.offset = 523, a.window = 300, a.k_tangents = 0;
  attend(r, a);
}
void attention_masked(Run& r) {
  Attention a;
  a.mask = 1, a.dropout = 0.3, a.m = 37;
  attend(r, a);
}
void attention_packed(Run& r) {
  Attention a;
  a.packed = true, a.causal = true;
  attend(r, a);
}
void attention_context(Run& r) {
  Attention a;
  a.context = 150, a.n = 37, a.m = 35, a.causal = true, a.offset = 150, a.dropout = 0.2, a.mask = 2;
  attend(r, a);
}

const Problem kProblems[] = {
    {"math", math_functions, false},
    {"rms_norm with residual", norm<false>},
    {"layer_norm", norm<true>},
    {"pointwise", pointwise},
    {"gated", gated},
    {"sensitivity, softmax", sensitivity},
    {"head", head},
    {"rotary", rotary},
    {"linear", linear},
    {"attention causal, D 64", attention_causal},
    {"attention bias, softcap, K 2", attention_odd},
    {"attention window, 530 keys", attention_long},
    {"attention mask, dropout", attention_masked},
    {"attention packed", attention_packed},
    {"attention context, bias, dropout", attention_context},
    {"attention, large mu", attention_large_mu},
};

// Two kernels that are right differ by roundings: of float32 sums in another order, of the results to their type, and
// on AMX of the factors of attention's products to bfloat16.
double tolerance(DType dtype, bool amx) {
  if (dtype == DType::f32) return 2e-5;
  if (dtype == DType::f16) return 1e-3;
  return amx ? 1e-2 : 4e-3;
}

// Every run by a thread of its own, at the same time.
void run_all(const Problem& problem, std::deque<Run>& runs) {
  std::vector<std::exception_ptr> errors(runs.size());
  std::vector<std::thread> callers;
  const auto call = [&](size_t i) {
    try {
      problem.run(runs[i]);
    } catch (...) {
      errors[i] = std::current_exception();
    }
  };
  for (size_t i = 1; i < runs.size(); ++i) callers.emplace_back(call, i);
  call(0);
  for (std::thread& caller : callers) caller.join();
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
}

int check(const std::string& capability, int threads, int callers) {
  int failures = 0;
  for (const Problem& problem : kProblems)
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      if (dtype != DType::f32 && !problem.low) continue;
      const std::string title = std::string(problem.name) + ", " + dtype_name(dtype);
      try {
        Run expected(dtype, threads);
        std::deque<Run> got;
        for (int i = 0; i < callers; ++i) got.emplace_back(dtype, threads);
        set_capability("default");
        problem.run(expected);
        set_capability(capability);
        const auto begin = std::chrono::steady_clock::now();
        run_all(problem, got);
        const double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
        selftest::Difference d;
        for (const Run& run : got)
          if (const selftest::Difference its = difference(run, expected); its.error >= d.error) d = its;
        const double allowed = tolerance(dtype, capability.compare(0, 3, "amx") == 0);
        const bool pass = d.error <= allowed;
        failures += !pass;
        std::printf("%s %-16s %-40s difference %.1e of %.0e (%s), %.1f ms\n", pass ? "pass" : "FAIL",
                    capability.c_str(), title.c_str(), d.error, allowed, d.name.c_str(), ms);
      } catch (const std::exception& error) {
        ++failures;
        std::printf("FAIL %-16s %-40s %s\n", capability.c_str(), title.c_str(), error.what());
      }
      std::fflush(stdout);
    }
  return failures;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string chosen = capability_name(initial_capability());
  std::printf("chosen: %s; runs here:", chosen.c_str());
  std::vector<std::string> names;
  for (Capability c : capabilities())
    if (capability_runs(c)) {
      std::printf(" %s", capability_name(c));
      if (c != Capability::baseline) names.push_back(capability_name(c));
    }
  std::printf("\n");
  int failures = 0;
  std::vector<std::string> wanted;
  int threads = 2, callers = 1;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--expect" && i + 1 < count) {
      if (chosen != arguments[++i]) {
        ++failures;
        std::printf("FAIL the chosen capability is %s, not %s\n", chosen.c_str(), arguments[i]);
      }
    } else if (argument == "--threads" && i + 1 < count) {
      threads = std::atoi(arguments[++i]);
    } else if (argument == "--callers" && i + 1 < count) {
      callers = std::atoi(arguments[++i]);
    } else {
      wanted.push_back(argument);
    }
  }
  for (const std::string& name : wanted.empty() ? names : wanted) {
    try {
      set_capability(name);
    } catch (const std::exception& error) {
      ++failures;
      std::printf("FAIL %s\n", error.what());
      continue;
    }
    failures += check(name, std::max(threads, 1), std::max(callers, 1));
  }
  for (const Registered& entry : registry())
    if (!selftest::called().empty() && selftest::called().count(entry.name) == 0) {
      ++failures;
      std::printf("FAIL no problem calls %s\n", entry.name);
    }
  std::printf(failures ? "%d failed\n" : "all passed\n", failures);
  return failures ? 1 : 0;
}
