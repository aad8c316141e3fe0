#include <string>

#include "page_pool.h"

namespace kelix::host {
namespace {

void Require(bool condition, const char* kind, int64_t number, const char* rule) {
  if (!condition) {
    throw std::logic_error(std::string("page pool: ") + kind + " " + std::to_string(number) + " " +
                           rule);
  }
}

}  // namespace

void PagePool::CheckSequence(SequenceId id, const Sequence& sequence) const {
  const int64_t num_pages = static_cast<int64_t>(sequence.pages.size());
  Require(num_pages == PagesFor(sequence.num_rows), "sequence", id, "has a wrong count of pages");
  const int64_t num_full = sequence.num_rows / page_size_;
  Require(sequence.num_committed <= num_full, "sequence", id, "committed a page it cannot fill");
  Page parent = kNoPage;
  for (int64_t i = 0; i < num_pages; ++i) {
    const Page page = sequence.pages[static_cast<size_t>(i)];
    const bool registered = cache_.Contains(page);
    if (i < sequence.num_committed) Require(registered, "page", page, "is committed but unknown");
    if (registered) {
      Require(cache_.Parent(page) == parent, "page", page, "is held without its ancestors");
    }
    if (i >= num_full) {
      Require(RefCount(page) == 1 && !registered, "page", page, "is partly filled and shared");
    }
    parent = page;
  }
}

void PagePool::Check() const {
  cache_.Check();
  std::vector<int32_t> owners(ref_counts_.size(), 0);
  for (const auto& [id, sequence] : sequences_) {
    for (Page page : sequence.pages) {
      Require(page >= 0 && page < num_pages(), "sequence", id, "holds a page out of range");
      ++owners[static_cast<size_t>(page)];
    }
    CheckSequence(id, sequence);
  }

  std::vector<bool> is_free(ref_counts_.size(), false);
  for (Page page : free_) {
    Require(!is_free[static_cast<size_t>(page)], "page", page, "is free twice");
    is_free[static_cast<size_t>(page)] = true;
  }
  int64_t num_idle = 0;
  for (Page page = 0; page < num_pages(); ++page) {
    const bool used = owners[static_cast<size_t>(page)] > 0;
    const bool idle = idle_.Contains(page);
    const bool free = is_free[static_cast<size_t>(page)];
    num_idle += idle;
    Require(RefCount(page) == owners[static_cast<size_t>(page)], "page", page,
            "has a reference count unlike its owners");
    Require(used + idle + free == 1, "page", page, "is lost or in two states");
    if (idle) Require(cache_.Contains(page), "page", page, "is idle without content");
    if (free) Require(!cache_.Contains(page), "page", page, "is free but registered");
  }

  // Oldest first, every page must come after all its children.
  std::vector<int32_t> children_seen(ref_counts_.size(), 0);
  int64_t num_listed = 0;
  for (Page page = idle_.Oldest(); page != kNoPage; page = idle_.Next(page)) {
    ++num_listed;
    Require(num_listed <= num_idle, "page", page, "makes the idle list a cycle");
    Require(children_seen[static_cast<size_t>(page)] == cache_.NumChildren(page), "page", page,
            "would be evicted before its children");
    if (cache_.Parent(page) != kNoPage) ++children_seen[static_cast<size_t>(cache_.Parent(page))];
  }
  Require(num_listed == num_idle && num_idle == idle_.size(), "count", num_idle,
          "of idle pages is not what the list holds");
}

}  // namespace kelix::host
