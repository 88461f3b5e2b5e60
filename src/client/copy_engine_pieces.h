// How both directions of the copy engine cut their work. Private to it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <string>

#include "base/status.h"
#include "client/copy_engine.h"

namespace sp::internal {

inline constexpr uint64_t kPieceBlocks = 4;

inline Status CheckOptions(const CopyOptions& options) {
  if (options.threads >= 0 && options.threads <= kCopyThreadsMax) return {};
  return {StatusCode::kInvalidArgument,
          "copy threads " + std::to_string(options.threads) + " not in 0.." + std::to_string(kCopyThreadsMax)};
}

// What each thread keeps from piece to piece of one call.
struct PieceScratch {
  std::unique_ptr<uint8_t[]> block;  // Empty until needed.
};

// Calls do_piece(first_block, end_block, scratch) for every piece of `blocks` blocks, on several threads, until it
// returns false or the call is cancelled. True when every piece was done. `fence` is called by each thread after each
// of its pieces. std::bad_alloc of a piece is thrown from here, on the calling thread, once no thread works any more.
template <typename DoPiece>
bool RunPieces(CopyThreads& threads, uint64_t blocks, const CopyOptions& options, void (*fence)(),
               const DoPiece& do_piece) {
  const uint64_t pieces = blocks / kPieceBlocks + (blocks % kPieceBlocks != 0);
  std::atomic<uint64_t> next = 0;
  std::atomic<uint64_t> done = 0;
  std::atomic<bool> stop = false;
  std::atomic<bool> no_memory = false;
  const auto work = [&] {
    PieceScratch scratch;
    while (!stop.load(std::memory_order_relaxed)) {
      if (options.cancel != nullptr && options.cancel->load(std::memory_order_relaxed)) return;
      const uint64_t piece = next.fetch_add(1, std::memory_order_relaxed);
      if (piece >= pieces) return;
      bool carry_on = false;
      try {
        carry_on = do_piece(piece * kPieceBlocks, std::min((piece + 1) * kPieceBlocks, blocks), scratch);
      } catch (const std::bad_alloc&) {
        no_memory.store(true, std::memory_order_relaxed);
      }
      fence();
      if (carry_on) {
        done.fetch_add(1, std::memory_order_relaxed);
      } else {
        stop.store(true, std::memory_order_relaxed);
      }
    }
  };
  const int wanted = options.threads == 0 ? DefaultCopyThreads() : options.threads;
  threads.Run(static_cast<int>(std::min<uint64_t>(static_cast<uint64_t>(wanted), pieces)), work);
  if (no_memory.load(std::memory_order_relaxed)) throw std::bad_alloc();
  return done.load(std::memory_order_relaxed) == pieces;
}

}  // namespace sp::internal
