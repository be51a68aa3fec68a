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

// Write the parts of the block's rows and columns, through the start of shared memory. of_row(d, half) returns what the 4
// lanes that share a row have of it, of_column(a, side) what the 8 lanes that share a column have: the same to each lane.
template <class RowPart, class ColumnPart, class OfRow, class OfColumn>
DEVICE void join_parts(OfRow of_row, Out<RowPart> row_parts, OfColumn of_column, Out<ColumnPart> column_parts,
                       const Tile& tile) {
  const auto rows = RowParts<RowPart>::at(0);
  BlockLogits::each_row([&](int d, int half) {
    const RowPart part = of_row(d, half);
    if (lane() % 4 == 0) rows.put(warp_column(), BlockLogits::row(d, half), part);
  });

  const auto columns = ColumnParts<ColumnPart>::at(rows.kBytes);
  BlockLogits::each_column([&](int a, int side) {
    const ColumnPart part = of_column(a, side);
    if (lane() / 4 == 0) columns.put(warp_row(), BlockLogits::column(a, side), part);
  });

  barrier();
  write_parts(rows, row_parts, columns, column_parts, tile);
}
