#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "page_list.h"

namespace kelix::host {

// Content index of full pages: a forest in which a page's parent holds the rows before its own. A
// page is found by its parent page and its ids. The chained hash only picks the bucket:
// ids are always compared, so a collision costs time and never returns a wrong page.
//
// Ownership is the pool's business; the cache only demands that pages go in after their parent and
// out after their children.
class PrefixCache {
 public:
  // `hash_bits` < 64 throws hash bits away, so that tests can force collisions.
  PrefixCache(int32_t num_pages, int64_t ids_per_page, int hash_bits);

  // The page that holds `ids` after `parent` (kNoPage: at the start of a sequence), or kNoPage.
  Page Find(Page parent, const int64_t* ids) const;

  // Registers `page`, not yet in the cache. Find must have returned kNoPage for the content.
  void Insert(Page page, Page parent, const int64_t* ids);

  // Forgets `page`, which must have no children.
  void Erase(Page page);

  // Forgets everything.
  void Clear();

  bool Contains(Page page) const { return node(page).registered; }
  bool HasIds(Page page, const int64_t* ids) const;
  Page Parent(Page page) const { return node(page).parent; }
  int32_t NumChildren(Page page) const { return node(page).num_children; }

  // Throws std::logic_error when links, counts or buckets contradict each other.
  void Check() const;

 private:
  struct Node {
    std::vector<int64_t> ids;
    uint64_t hash = 0;
    Page parent = kNoPage;
    Page next_in_bucket = kNoPage;
    int32_t num_children = 0;
    bool registered = false;
  };

  Node& node(Page page) { return nodes_[static_cast<size_t>(page)]; }
  const Node& node(Page page) const { return nodes_[static_cast<size_t>(page)]; }
  uint64_t Hash(Page parent, const int64_t* ids) const;
  Page& Bucket(uint64_t hash) { return buckets_[hash & (buckets_.size() - 1)]; }
  Page Bucket(uint64_t hash) const { return buckets_[hash & (buckets_.size() - 1)]; }

  int64_t ids_per_page_;
  uint64_t hash_mask_;
  std::vector<Node> nodes_;    // indexed by page
  std::vector<Page> buckets_;  // heads of chains through next_in_bucket; a power of two of them
};

}  // namespace kelix::host
