#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

#include "page_list.h"
#include "prefix_cache.h"

namespace kelix::host {

using SequenceId = int64_t;

struct UnknownSequence : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The rows of a sequence, row-major, `row_width` ids each.
struct Rows {
  const int64_t* ids = nullptr;
  int64_t count = 0;
};

struct Match {
  std::vector<Page> pages;
  int64_t num_rows = 0;
};

// Hands out the pages of a paged KV cache to sequences and keeps the content of released ones.
//
// A page is free (in the free list), used (held by sequences, counted) or idle (held by none, still
// registered in the prefix cache). Two rules keep eviction O(1):
//  * a sequence that holds a registered page holds all its ancestors too, so every idle page can
//    be reclaimed, and available pages are simply free + idle;
//  * release() frees the last page first, so in the idle list children come before their parents
//    and the oldest idle page has no children.
// Bad arguments throw std::invalid_argument or UnknownSequence before anything changes.
class PagePool {
 public:
  PagePool(int64_t num_pages, int64_t page_size, int64_t row_width, int hash_bits);

  int64_t num_pages() const { return static_cast<int64_t>(ref_counts_.size()); }
  int64_t page_size() const { return page_size_; }
  int64_t row_width() const { return row_width_; }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }
  int64_t num_cached() const { return idle_.size(); }
  int64_t num_available() const { return num_free() + num_cached(); }
  int64_t num_used() const { return num_pages() - num_available(); }
  int64_t num_sequences() const { return static_cast<int64_t>(sequences_.size()); }

  // Longest cached prefix in full pages that leaves at least the last row to compute.
  Match MatchPrefix(Rows rows) const;
  // New sequence holding the cached prefix, and the number of its rows.
  std::pair<SequenceId, int64_t> Add(Rows rows);
  // Makes room for `num_rows` rows in all; false, and no change, when pages are short.
  bool Grow(SequenceId id, int64_t num_rows);
  // Registers the full pages of `rows`, given from the first row on; returns how many are new.
  int64_t Commit(SequenceId id, Rows rows);
  void Release(SequenceId id);

  int64_t NumRows(SequenceId id) const { return Get(id, "num_rows").num_rows; }
  int64_t NumCommitted(SequenceId id) const;
  const std::vector<Page>& PageTable(SequenceId id) const { return Get(id, "page_table").pages; }
  // Writes the page table of ids[b] to out[b * width ...]; the rest of `out` becomes 0.
  void WritePageTables(std::span<const SequenceId> ids, std::span<int32_t> out,
                       int64_t width) const;

  // Forgets all content; live sequences keep their pages and stop registering.
  void ResetCache();
  // Throws std::logic_error when an invariant is broken.
  void Check() const;

 private:
  struct Sequence {
    std::vector<Page> pages;
    int64_t num_rows = 0;       // rows there is room for
    int64_t num_committed = 0;  // leading pages known to the prefix cache
    bool cacheable = true;      // false once its content outlived ResetCache
  };

  Sequence& Get(SequenceId id, const char* operation);
  const Sequence& Get(SequenceId id, const char* operation) const;
  int64_t PagesFor(int64_t num_rows) const;
  const int64_t* PageIds(Rows rows, int64_t index) const;
  int32_t& RefCount(Page page) { return ref_counts_[static_cast<size_t>(page)]; }
  int32_t RefCount(Page page) const { return ref_counts_[static_cast<size_t>(page)]; }

  Page Allocate();  // num_available() must be positive
  void Acquire(Page page);
  void Drop(Page page);
  bool CommitPage(Sequence& sequence, const int64_t* ids);
  void CheckSequence(SequenceId id, const Sequence& sequence) const;

  int64_t page_size_;
  int64_t row_width_;
  std::vector<int32_t> ref_counts_;  // indexed by page
  std::vector<Page> free_;           // a stack
  PageList idle_;
  PrefixCache cache_;
  std::unordered_map<SequenceId, Sequence> sequences_;
  SequenceId next_id_ = 1;
};

}  // namespace kelix::host
