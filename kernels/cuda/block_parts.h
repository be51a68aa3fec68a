// The warps' results for the rows (or columns) of a block, joined through shared memory in the order of the warps.
#pragma once
#include "block_logits.h"

template <class Part, int kWarps>
struct BlockParts {
  static constexpr int kBytes = kWarps * kBlock * static_cast<int>(sizeof(Part));
  Shared<Part> parts;  // (warps, 128)

  static DEVICE BlockParts at(int byte_offset) { return {shared_memory<Part>(byte_offset)}; }

  DEVICE void put(int warp, int position, Part part) const { parts.put(warp * kBlock + position, part); }

  // Write the joined part of one position into line `block` of out (blocks, count). Needs a barrier after the puts.
  DEVICE void write(int position, Out<Part> out, int block, int first, int count) const {
    Part whole = parts[position];
    for (int w = 1; w < kWarps; ++w) whole = whole + parts[w * kBlock + position];
    if (first + position < count) out.put(static_cast<i64>(block) * count + first + position, whole);
  }
};

// One thread a row and one a column.
template <class RowPart, class ColumnPart>
DEVICE void write_parts(BlockParts<RowPart, kWarpsAcross> rows, Out<RowPart> row_parts,
                        BlockParts<ColumnPart, kWarpsDown> columns, Out<ColumnPart> column_parts, const Tile& tile) {
  const int position = thread() % kBlock;
  if (thread() < kBlock)
    rows.write(position, row_parts, block_x(), first_row(), tile.rows);
  else
    columns.write(position, column_parts, block_y(), first_column(), tile.columns);
}
