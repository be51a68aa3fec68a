// The warps' results for the rows (or columns) of a block, joined through shared memory in the order of the warps.
#pragma once
#include "block_logits.h"

template <class Part, int kWarps, int kPositions>
struct BlockParts {
  static constexpr int kBytes = kWarps * kPositions * static_cast<int>(sizeof(Part));
  Shared<Part> parts;  // (warps, positions)

  static DEVICE BlockParts at(int byte_offset) { return {shared_memory<Part>(byte_offset)}; }

  DEVICE void put(int warp, int position, Part part) const { parts.put(warp * kPositions + position, part); }

  // Write the joined part of one position into line `block` of out (blocks, count). Needs a barrier after the puts.
  DEVICE void write(int position, Out<Part> out, int block, int first, int count) const {
    Part whole = parts[position];
    for (int w = 1; w < kWarps; ++w) whole = whole + parts[w * kPositions + position];
    if (first + position < count) out.put(static_cast<i64>(block) * count + first + position, whole);
  }
};

template <class Part>
using RowParts = BlockParts<Part, kWarpsAcross, kBlockRows>;
template <class Part>
using ColumnParts = BlockParts<Part, kWarpsDown, kBlockColumns>;

// One thread a row or column, as often as it takes.
template <class RowPart, class ColumnPart>
DEVICE void write_parts(RowParts<RowPart> rows, Out<RowPart> row_parts, ColumnParts<ColumnPart> columns,
                        Out<ColumnPart> column_parts, const Tile& tile) {
  for (int position = thread(); position < kBlockRows + kBlockColumns; position += kThreads)
    if (position < kBlockRows)
      rows.write(position, row_parts, block_x(), first_row(), tile.rows);
    else
      columns.write(position - kBlockRows, column_parts, block_y(), first_column(), tile.columns);
}
