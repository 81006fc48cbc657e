// The class ItemIndex of fastdiff._C: histories as Python holds them, packed in one pass.

#pragma once

#include <pybind11/pybind11.h>

namespace fastdiff {

void bind_item_index(pybind11::module_& module);

}  // namespace fastdiff
