#include "page_pool.h"

#include <algorithm>
#include <limits>
#include <string>

namespace kelix::host {
namespace {

[[noreturn]] void Reject(const std::string& message) { throw std::invalid_argument(message); }

int64_t CheckedSize(const char* name, int64_t value, int64_t limit) {
  if (value < 1 || value > limit) {
    Reject(std::string("PagePool: ") + name + " must be in 1.." + std::to_string(limit) + ", got " +
           std::to_string(value));
  }
  return value;
}

int CheckedHashBits(int bits) {
  if (bits < 0 || bits > 64) {
    Reject("PagePool: hash_bits must be in 0..64, got " + std::to_string(bits));
  }
  return bits;
}

// Page ids are int32 on the device; page_size * row_width must not overflow either.
constexpr int64_t kMaxPages = std::numeric_limits<int32_t>::max() - 1;
constexpr int64_t kMaxPageSize = 1 << 20;
constexpr int64_t kMaxRowWidth = 1 << 20;

}  // namespace

PagePool::PagePool(int64_t num_pages, int64_t page_size, int64_t row_width, int hash_bits)
    : page_size_(CheckedSize("page_size", page_size, kMaxPageSize)),
      row_width_(CheckedSize("row_width", row_width, kMaxRowWidth)),
      ref_counts_(static_cast<size_t>(CheckedSize("num_pages", num_pages, kMaxPages)), 0),
      idle_(static_cast<int32_t>(num_pages)),
      cache_(static_cast<int32_t>(num_pages), page_size * row_width, CheckedHashBits(hash_bits)) {
  free_.reserve(ref_counts_.size());
  for (Page page = static_cast<Page>(num_pages); page-- > 0;) free_.push_back(page);
}

const PagePool::Sequence& PagePool::Get(SequenceId id, const char* operation) const {
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) {
    throw UnknownSequence(std::string(operation) + ": no sequence " + std::to_string(id) +
                          " (never added, or already released)");
  }
  return found->second;
}

PagePool::Sequence& PagePool::Get(SequenceId id, const char* operation) {
  return const_cast<Sequence&>(std::as_const(*this).Get(id, operation));
}

int64_t PagePool::PagesFor(int64_t num_rows) const {
  return num_rows / page_size_ + (num_rows % page_size_ != 0);
}

const int64_t* PagePool::PageIds(Rows rows, int64_t index) const {
  return rows.ids + index * page_size_ * row_width_;
}

Page PagePool::Allocate() {
  Page page;
  if (free_.empty()) {
    page = idle_.Oldest();
    cache_.Erase(page);
    idle_.Remove(page);
  } else {
    page = free_.back();
    free_.pop_back();
  }
  RefCount(page) = 1;
  return page;
}

void PagePool::Acquire(Page page) {
  if (RefCount(page)++ == 0) idle_.Remove(page);
}

void PagePool::Drop(Page page) {
  if (--RefCount(page) > 0) return;
  if (cache_.Contains(page)) {
    idle_.PushNewest(page);
  } else {
    free_.push_back(page);
  }
}

Match PagePool::MatchPrefix(Rows rows) const {
  Match match;
  const int64_t limit = rows.count > 0 ? (rows.count - 1) / page_size_ : 0;
  Page parent = kNoPage;
  for (int64_t index = 0; index < limit; ++index) {
    parent = cache_.Find(parent, PageIds(rows, index));
    if (parent == kNoPage) break;
    match.pages.push_back(parent);
  }
  match.num_rows = static_cast<int64_t>(match.pages.size()) * page_size_;
  return match;
}

std::pair<SequenceId, int64_t> PagePool::Add(Rows rows) {
  Match match = MatchPrefix(rows);
  const SequenceId id = next_id_;
  Sequence& sequence = sequences_[id];
  ++next_id_;
  sequence.num_rows = match.num_rows;
  sequence.num_committed = static_cast<int64_t>(match.pages.size());
  sequence.pages = std::move(match.pages);
  for (Page page : sequence.pages) Acquire(page);
  return {id, sequence.num_rows};
}

bool PagePool::Grow(SequenceId id, int64_t num_rows) {
  Sequence& sequence = Get(id, "grow");
  if (num_rows < 0) Reject("grow: num_rows must be >= 0, got " + std::to_string(num_rows));
  const int64_t held = static_cast<int64_t>(sequence.pages.size());
  const int64_t missing = PagesFor(num_rows) - held;
  if (missing > num_available()) return false;
  if (missing > 0) {
    // Doubling keeps a sequence that grows by one page per call at amortised O(1).
    const size_t needed = static_cast<size_t>(held + missing);
    if (needed > sequence.pages.capacity()) {
      sequence.pages.reserve(std::max(needed, 2 * sequence.pages.capacity()));
    }
  }
  for (int64_t i = 0; i < missing; ++i) sequence.pages.push_back(Allocate());
  sequence.num_rows = std::max(sequence.num_rows, num_rows);
  return true;
}

int64_t PagePool::Commit(SequenceId id, Rows rows) {
  Sequence& sequence = Get(id, "commit");
  if (rows.count > sequence.num_rows) {
    Reject("commit: rows must not exceed the " + std::to_string(sequence.num_rows) +
           " the sequence was grown to, got " + std::to_string(rows.count));
  }
  if (!sequence.cacheable) return 0;
  if (rows.count < sequence.num_committed * page_size_) {
    Reject("commit: rows must start at the sequence's first row and hold at least the " +
           std::to_string(sequence.num_committed * page_size_) + " committed before, got " +
           std::to_string(rows.count));
  }
  const int64_t num_full = rows.count / page_size_;
  if (num_full == sequence.num_committed) return 0;
  for (int64_t i = 0; i < sequence.num_committed; ++i) {
    if (!cache_.HasIds(sequence.pages[static_cast<size_t>(i)], PageIds(rows, i))) {
      Reject("commit: rows of page " + std::to_string(i) + " differ from those committed before");
    }
  }
  int64_t num_new = 0;
  while (sequence.num_committed < num_full) {
    num_new += CommitPage(sequence, PageIds(rows, sequence.num_committed));
  }
  return num_new;
}

bool PagePool::CommitPage(Sequence& sequence, const int64_t* ids) {
  const size_t index = static_cast<size_t>(sequence.num_committed);
  Page& own = sequence.pages[index];
  const Page parent = index == 0 ? kNoPage : sequence.pages[index - 1];
  const Page original = cache_.Find(parent, ids);
  if (original == kNoPage) {
    cache_.Insert(own, parent, ids);
  } else {
    Acquire(original);
    Drop(own);
    own = original;
  }
  ++sequence.num_committed;
  return original == kNoPage;
}

void PagePool::Release(SequenceId id) {
  std::vector<Page> pages = std::move(Get(id, "release").pages);
  sequences_.erase(id);
  std::for_each(pages.rbegin(), pages.rend(), [this](Page page) { Drop(page); });
}

int64_t PagePool::NumCommitted(SequenceId id) const {
  return Get(id, "num_committed").num_committed * page_size_;
}

void PagePool::WritePageTables(std::span<const SequenceId> ids, std::span<int32_t> out,
                               int64_t width) const {
  for (SequenceId id : ids) {
    const int64_t held = static_cast<int64_t>(Get(id, "write_page_tables").pages.size());
    if (held > width) {
      Reject("write_page_tables: sequence " + std::to_string(id) + " has " + std::to_string(held) +
             " pages, out has only " + std::to_string(width) + " columns");
    }
  }
  std::fill(out.begin(), out.end(), 0);
  for (size_t b = 0; b < ids.size(); ++b) {
    const std::vector<Page>& pages = PageTable(ids[b]);
    std::copy(pages.begin(), pages.end(), out.begin() + static_cast<int64_t>(b) * width);
  }
}

void PagePool::ResetCache() {
  cache_.Clear();
  while (idle_.size() > 0) {
    const Page page = idle_.Oldest();
    idle_.Remove(page);
    free_.push_back(page);
  }
  for (auto& [id, sequence] : sequences_) {
    sequence.num_committed = 0;
    sequence.cacheable = false;
  }
}

}  // namespace kelix::host
