#include "layout.h"

namespace aajr {
namespace {

void fill(const NamedStream& t, const NamedStream& first) {
  const View &v = *t.view, &model = *first.view;
  if (!v) {
    if (&t == &first) fail(std::string(t.name) + " must not be None.");
    return;
  }
  check_floating(v, t.name);
  check_dtype(v, t.name, model.dtype);
  bool same = model.dim >= 1 && v.dim == model.dim && v.size[0] == t.stacks;
  for (int axis = 1; same && axis < model.dim; ++axis) same = v.size[axis] == model.size[axis];
  if (!same)
    fail(std::string(t.name) + " must have " + std::to_string(t.stacks) + " stacked tensors of the shape of " +
         first.name + ".");
  t.stream->data = v.data;
  t.stream->stack = v.stride[0];
}

}  // namespace

RowLayout shared_layout(std::initializer_list<NamedStream> tensors, bool last_axis) {
  const NamedStream& first = *tensors.begin();
  for (const NamedStream& t : tensors) fill(t, first);
  const View& model = *first.view;
  RowLayout layout{1, 0, {}};
  bool row_grows = !last_axis;
  int axis = model.dim - 1;
  if (last_axis) {
    if (model.dim < 2) fail(std::string(first.name) + " must have an axis behind the stack axis.");
    for (const NamedStream& t : tensors) check_last_stride(*t.view, t.name);
    layout.size = model.size[axis--];
  }
  for (; axis >= 1; --axis) {
    const int64_t size = model.size[axis];
    if (size == 1) continue;
    const int top = layout.outer - 1;
    bool follows = row_grows || top >= 0;
    for (const NamedStream& t : tensors)
      if (*t.view && follows)
        follows = t.view->stride[axis] == (row_grows ? layout.size : t.stream->outer[top] * layout.outer_size[top]);
    if (follows) {
      (row_grows ? layout.size : layout.outer_size[top]) *= size;
      continue;
    }
    row_grows = false;
    for (const NamedStream& t : tensors)
      if (*t.view) t.stream->outer[layout.outer] = t.view->stride[axis];
    layout.outer_size[layout.outer++] = size;
  }
  return layout;
}

}  // namespace aajr
