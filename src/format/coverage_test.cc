// A step is complete only if its tensors are whole (I-1).
#include <cstdio>
#include <ctime>
#include <numeric>

#include "format/shard_index.h"
#include "format/test_values.h"

namespace sp {
namespace {

using Shape = std::vector<uint64_t>;

TensorPiece Piece(std::string name, Shape offsets, Shape shape, Shape global, std::string dtype = "F32") {
  return {std::move(name), std::move(dtype), std::move(shape), std::move(offsets), std::move(global), 0, 0};
}

Status Check(const std::vector<std::vector<TensorPiece>>& ranks, const std::vector<std::string>& expected = {}) {
  std::vector<std::shared_ptr<const PackedIndex>> indexes;
  std::vector<const PackedIndex*> pointers;
  for (const auto& pieces : ranks) {
    ShardIndex index{pieces, {}, 0, {}};
    for (const std::string& name : expected) index.expected.Add(name);
    indexes.push_back(PackedIndex::Of(index));
    pointers.push_back(indexes.back().get());
  }
  return CheckCoverage(pointers);
}

TEST(Coverage, WholeTensors) {
  EXPECT_TRUE(Check({}).ok());
  EXPECT_TRUE(Check({{}}).ok());
  EXPECT_TRUE(Check({{Piece("a", {0, 0}, {2, 3}, {2, 3}), Piece("scalar", {}, {}, {})}}).ok());
  EXPECT_TRUE(Check({{Piece("a", {0}, {4}, {4})}, {Piece("a", {0}, {4}, {4})}}).ok()) << "a replica on every rank";
}

TEST(Coverage, SplitAlongOneDimension) {
  const auto rank = [](uint64_t begin, uint64_t size) { return std::vector{Piece("w", {begin, 0}, {size, 5}, {10, 5})}; };
  EXPECT_TRUE(Check({rank(0, 4), rank(4, 4), rank(8, 2)}).ok());
  EXPECT_TRUE(Check({rank(8, 2), rank(0, 4), rank(4, 4)}).ok());
  EXPECT_TRUE(Check({rank(0, 4), rank(4, 4), rank(8, 2), rank(4, 4)}).ok()) << "a repeated piece";
  EXPECT_TRUE(Check({rank(0, 5), rank(5, 5), rank(10, 0)}).ok()) << "a rank with nothing left";
  const Status gap = Check({rank(0, 4), rank(8, 2)});
  EXPECT_EQ(gap.code(), StatusCode::kIncomplete);
  EXPECT_NE(gap.message().find("tensor w"), std::string::npos);
  EXPECT_EQ(Check({rank(0, 4), rank(4, 5)}).code(), StatusCode::kIncomplete) << "the last row";
  EXPECT_EQ(Check({rank(0, 4), rank(3, 7)}).code(), StatusCode::kCorrupt) << "overlap";
  EXPECT_EQ(Check({rank(0, 10), rank(3, 2)}).code(), StatusCode::kCorrupt) << "a part of the whole again";
  EXPECT_EQ(Check({rank(0, 4), rank(3, 4), rank(8, 2)}).code(), StatusCode::kCorrupt) << "gap and overlap of the same size";
  EXPECT_EQ(Check({rank(0, 0)}).code(), StatusCode::kIncomplete);
}

TEST(Coverage, EmptyTensors) {
  EXPECT_TRUE(Check({{Piece("e", {0, 0}, {0, 7}, {0, 7})}}).ok());
  EXPECT_EQ(Check({{Piece("e", {0, 0}, {0, 7}, {1, 7})}}).code(), StatusCode::kIncomplete);
}

TEST(Coverage, PiecesMustAgree) {
  EXPECT_EQ(Check({{Piece("w", {0}, {2}, {4})}, {Piece("w", {2}, {2}, {4}, "BF16")}}).code(), StatusCode::kCorrupt);
  EXPECT_EQ(Check({{Piece("w", {0}, {2}, {4})}, {Piece("w", {2}, {2}, {5})}}).code(), StatusCode::kCorrupt);
  EXPECT_EQ(Check({{Piece("w", {0}, {4}, {4})}, {Piece("w", {0, 0}, {4, 1}, {4, 1})}}).code(), StatusCode::kCorrupt);
  EXPECT_EQ(Check({{Piece("w", {3}, {2}, {4})}}).code(), StatusCode::kCorrupt) << "beyond the end";
  EXPECT_EQ(Check({{Piece("w", {UINT64_MAX}, {2}, {4})}}).code(), StatusCode::kCorrupt);
}

TEST(Coverage, Grids) {
  std::vector<std::vector<TensorPiece>> ranks;
  for (uint64_t i = 0; i < 4; ++i) {
    for (uint64_t j = 0; j < 3; ++j) ranks.push_back({Piece("w", {2 * i, 5 * j}, {2, 5}, {8, 15})});
  }
  EXPECT_TRUE(Check(ranks).ok());
  auto without = ranks;
  without.erase(without.begin() + 5);
  EXPECT_EQ(Check(without).code(), StatusCode::kIncomplete);
  auto moved = ranks;  // One cell in the place of another one half-way: as many elements, but a gap and an overlap.
  moved[5][0].offsets[1] -= 2;
  EXPECT_EQ(Check(moved).code(), StatusCode::kCorrupt);
  // A pinwheel: five pieces, and no straight cut separates them.
  const Shape global = {3, 3};
  EXPECT_TRUE(Check({{Piece("p", {0, 0}, {1, 2}, global)},
                     {Piece("p", {0, 2}, {2, 1}, global)},
                     {Piece("p", {2, 1}, {1, 2}, global)},
                     {Piece("p", {1, 0}, {2, 1}, global)},
                     {Piece("p", {1, 1}, {1, 1}, global)}})
                  .ok());
  EXPECT_EQ(Check({{Piece("p", {0, 0}, {1, 2}, global)},
                   {Piece("p", {0, 2}, {2, 1}, global)},
                   {Piece("p", {2, 1}, {1, 2}, global)},
                   {Piece("p", {1, 0}, {2, 1}, global)},
                   {Piece("p", {1, 2}, {1, 1}, global)}})
                .code(),
            StatusCode::kCorrupt);
}

TEST(Coverage, ExpectedNames) {
  EXPECT_TRUE(Check({{Piece("a", {0}, {1}, {1})}, {Piece("b", {0}, {1}, {1})}}, {"a", "b"}).ok());
  const Status missing = Check({{Piece("a", {0}, {1}, {1})}, {}}, {"a", "b"});
  EXPECT_EQ(missing.code(), StatusCode::kIncomplete);
  EXPECT_NE(missing.message().find("tensor b"), std::string::npos);
}

TEST(Coverage, SharedIndexCountsOnce) {
  const auto index = PackedIndex::Of({{Piece("w", {0}, {2}, {2})}, {}, 0, {}});
  EXPECT_TRUE(CheckCoverage({index.get(), index.get(), index.get()}).ok());
}

TEST(Coverage, AnAliasHasThePiecesOfItsTargets) {
  const auto rank = [](uint64_t offset, const std::string& alias) {
    return PackedIndex::Of({{Piece("w", {offset, 300}, {2, 700}, {4, 1000}), Piece("v", {0}, {1}, {1})}, {{alias, 0}, {"u", 1}}, 0, {}});
  };
  const auto check = [&](uint64_t second, const std::string& alias) {
    const auto left = PackedIndex::Of({{Piece("w", {0, 0}, {4, 300}, {4, 1000})}, {{"t", 0}}, 0, {}}), a = rank(0, "t"), b = rank(second, alias);
    return CheckCoverage({left.get(), a.get(), b.get()});
  };
  EXPECT_TRUE(check(2, "t").ok()) << check(2, "t").ToString();
  EXPECT_EQ(check(2, "x").code(), StatusCode::kIncomplete);
  EXPECT_NE(check(2, "x").message().find("tensor t:"), std::string::npos) << "met before x";
  EXPECT_EQ(check(1, "t").code(), StatusCode::kCorrupt);
}

// Against the obvious model, a counter per element: random boxes in a small grid, cut from the whole and then disturbed.
TEST(Coverage, AgreesWithCountingElements) {
  testing::Randomizer random(11);
  int complete = 0, gaps = 0, overlaps = 0;
  for (int round = 0; round < 20000; ++round) {
    const Shape global = {1 + random.Next() % 5, 1 + random.Next() % 4, 1 + random.Next() % 3};
    std::vector<TensorPiece> pieces = {Piece("w", {0, 0, 0}, global, global)};
    for (uint64_t cuts = random.Next() % 7; cuts > 0; --cuts) {
      const size_t i = random.Next() % pieces.size();
      const size_t d = random.Next() % 3;
      const uint64_t at = random.Next() % (pieces[i].shape[d] + 1);
      TensorPiece upper = pieces[i];
      upper.offsets[d] += at;
      upper.shape[d] -= at;
      pieces[i].shape[d] = at;
      pieces.push_back(upper);
    }
    switch (random.Next() % 6) {
      case 0: pieces.push_back(pieces[random.Next() % pieces.size()]); break;
      case 1: pieces.erase(pieces.begin() + static_cast<std::ptrdiff_t>(random.Next() % pieces.size())); break;
      case 2: case 3: {
        TensorPiece& p = pieces[random.Next() % pieces.size()];
        const size_t d = random.Next() % 3;
        p.offsets[d] = random.Next() % (global[d] - p.shape[d] + 1);
        break;
      }
      default: break;
    }
    if (pieces.empty()) continue;

    std::vector<TensorPiece> distinct;
    for (const TensorPiece& p : pieces) {
      if (std::find(distinct.begin(), distinct.end(), p) == distinct.end()) distinct.push_back(p);
    }
    std::vector<int> count(global[0] * global[1] * global[2]);
    for (const TensorPiece& p : distinct) {
      for (uint64_t x = 0; x < p.shape[0]; ++x) {
        for (uint64_t y = 0; y < p.shape[1]; ++y) {
          for (uint64_t z = 0; z < p.shape[2]; ++z) {
            ++count[((p.offsets[0] + x) * global[1] + p.offsets[1] + y) * global[2] + p.offsets[2] + z];
          }
        }
      }
    }
    const bool gap = std::find(count.begin(), count.end(), 0) != count.end();
    const bool overlap = std::any_of(count.begin(), count.end(), [](int c) { return c > 1; });
    const Status status = Check({pieces});
    if (!gap && !overlap) {
      ASSERT_TRUE(status.ok()) << status.ToString();
      ++complete;
    } else if (status.code() == StatusCode::kIncomplete) {
      ASSERT_TRUE(gap);
      ++gaps;
    } else {
      ASSERT_EQ(status.code(), StatusCode::kCorrupt);
      ASSERT_TRUE(overlap);
      ++overlaps;
    }
  }
  EXPECT_GT(complete, 1000);
  EXPECT_GT(gaps, 300);
  EXPECT_GT(overlaps, 300);
}

// Thousands of ranks are checked once per set of structures, but by the event loop's process: this must not take seconds per tensor.
TEST(Coverage, ManyPieces) {
  std::vector<std::vector<TensorPiece>> ranks;
  for (uint64_t i = 0; i < 256; ++i) {
    for (uint64_t j = 0; j < 256; ++j) ranks.push_back({Piece("w", {i, j}, {1, 1}, {256, 256}), Piece("v", {i * 256 + j}, {1}, {65536})});
  }
  EXPECT_TRUE(Check(ranks).ok());
  ranks.back()[0].offsets[1] -= 1;
  EXPECT_EQ(Check(ranks).code(), StatusCode::kIncomplete) << "a repeated piece where another one was needed";
}

TEST(Coverage, HostileDimensionsAreBounded) {
  // Thirteen split dimensions: eight thousand corners for each of eight thousand pieces.
  const Shape global(13, 2), ones(13, 1), zeros(13, 0);
  EXPECT_EQ(Check({{Piece("w", zeros, ones, global)}}).code(), StatusCode::kIncomplete);
  std::vector<TensorPiece> all;  // Every cell: a true tiling, refused for its cost.
  for (uint64_t cell = 0; cell < uint64_t{1} << 13; ++cell) {
    all.push_back(Piece("w", zeros, ones, global));
    for (size_t d = 0; d < 13; ++d) all.back().offsets[d] = cell >> d & 1;
  }
  EXPECT_EQ(Check({all}).code(), StatusCode::kLimit);
  const Shape huge(2, uint64_t{1} << 33);
  EXPECT_EQ(Check({{Piece("w", {0, 0}, {1, 1}, huge)}}).code(), StatusCode::kLimit);
}

// Found by fuzz_shard_index: pieces that halve a tensor along one dimension after another have few boxes and very many corners, and any number of
// names may share their bytes. The check runs in the event loop, so its work must follow the length of what was sent (I-26, I-40).
TEST(Coverage, FewPiecesOfManyDimensionsAreBounded) {
  const auto halves = [](const std::string& name, size_t dims) {
    std::vector<TensorPiece> pieces;
    for (size_t i = 0; i <= dims; ++i) {
      Shape offsets(dims, 0), shape(dims, 2);
      for (size_t d = 0; d < dims; ++d) {
        if (d < i) offsets[d] = 1;
        if (d <= i) shape[d] = 1;
      }
      pieces.push_back(Piece(name, offsets, shape, Shape(dims, 2)));
    }
    return pieces;
  };
  EXPECT_TRUE(Check({halves("w", 6)}).ok());
  EXPECT_EQ(Check({halves("w", 17)}).code(), StatusCode::kLimit);
  std::vector<TensorPiece> many;
  for (int n = 0; n < 1000; ++n) {
    for (TensorPiece& piece : halves("w" + std::to_string(n), 11)) many.push_back(std::move(piece));
  }
  EXPECT_EQ(Check({many}).code(), StatusCode::kLimit);
}

// Corners that many small tensors do not use are not one large tensor's (I-26).
TEST(Coverage, ManyNamesGiveNoTensorMoreCorners) {
  constexpr uint64_t kDims = 12;  // Every cell of a tensor: 16 million corners.
  std::vector<TensorPiece> pieces;
  for (uint64_t cell = 0; cell < uint64_t{1} << kDims; ++cell) {
    pieces.push_back(Piece("w", Shape(kDims, 0), Shape(kDims, 1), Shape(kDims, 2)));
    for (size_t d = 0; d < kDims; ++d) pieces.back().offsets[d] = cell >> d & 1;
  }
  for (int n = 0; n < 300'000; ++n) pieces.push_back(Piece(std::to_string(n), {}, {}, {}));
  EXPECT_EQ(Check({pieces}).code(), StatusCode::kLimit);
}

// The dearest that one user may keep (32 MiB by PackedIndex::cost, docs/operating/limits.md): the check holds up the event loop so long.
TEST(Coverage, I26_TheDearestChecksEndSoon) {
  constexpr uint64_t kKept = uint64_t{32} << 20;
  const auto check = [&](const char* what, ShardIndex index) {
    const auto packed = PackedIndex::Of(std::move(index));
    EXPECT_LE(packed->cost(), kKept) << what;
    EXPECT_GT(packed->cost(), kKept / 4 * 3) << what;
    const std::clock_t begin = std::clock();
    EXPECT_TRUE(CheckCoverage({packed.get()}).ok()) << what;
    const double seconds = static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
    std::printf("%s: %u entries, %.2f s\n", what, packed->count, seconds);
    EXPECT_LT(seconds, 20) << what;  // Optimised, half a second; sanitizers and slow machines take their time.
  };
  ShardIndex aliases{{Piece("w", Shape(64, 0), Shape(64, 1), Shape(64, 1))}, {}, 0, {}};
  for (uint32_t i = 0; i < 750'000; ++i) aliases.aliases.push_back({std::to_string(i), 0});
  check("names of one tensor of 64 dimensions", std::move(aliases));
  ShardIndex grid;
  const Shape global = {80, 80, 80};
  for (uint64_t cell = 0; cell < 80 * 80 * 80; ++cell) grid.pieces.push_back(Piece("w", {cell % 80, cell / 80 % 80, cell / 6400}, {1, 1, 1}, global));
  check("cells of one tensor of 3 dimensions", std::move(grid));
}

}  // namespace
}  // namespace sp
