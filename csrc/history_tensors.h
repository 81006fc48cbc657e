// The histories of an encoder, and the table that they index, checked.
#pragma once

#include "tensors.h"

namespace fastdiff {

struct HistoryTensors {
  Tensor items, lengths, table;  // [users, places] int64, [users] int64, [table_rows, dim] float32
  int64_t users, places, table_rows, dim;

  HistoryTensors(const char* op, const Tensor& item_rows, const Tensor& item_counts, const Tensor& item_table)
      : items(checked(op, "items", item_rows, ScalarType::Long, {-1, -1})),
        lengths(checked(op, "lengths", item_counts, ScalarType::Long, {items.size(0)})),
        table(floats(op, "item_table", item_table, {-1, -1})),
        users(items.size(0)),
        places(items.size(1)),
        table_rows(table.size(0)),
        dim(table.size(1)) {}
};

}  // namespace fastdiff
