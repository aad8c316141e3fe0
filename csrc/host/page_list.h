#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kelix::host {

using Page = int32_t;
inline constexpr Page kNoPage = -1;

// Doubly linked list of pages, oldest first. The links live in one array indexed by page, so that
// every operation is O(1) and allocates nothing.
class PageList {
 public:
  explicit PageList(int32_t num_pages) : links_(static_cast<size_t>(num_pages) + 1) {
    sentinel_ = num_pages;
    link(sentinel_) = {sentinel_, sentinel_, true};
  }

  int32_t size() const { return size_; }
  bool Contains(Page page) const { return link(page).linked; }
  Page Oldest() const { return Next(sentinel_); }
  // The page after `page`, or kNoPage at the end.
  Page Next(Page page) const {
    const Page next = link(page).next;
    return next == sentinel_ ? kNoPage : next;
  }

  // `page` must not be in the list.
  void PushNewest(Page page) {
    const Page last = link(sentinel_).previous;
    link(page) = {last, sentinel_, true};
    link(last).next = page;
    link(sentinel_).previous = page;
    ++size_;
  }

  // `page` must be in the list.
  void Remove(Page page) {
    Link& gone = link(page);
    link(gone.previous).next = gone.next;
    link(gone.next).previous = gone.previous;
    gone.linked = false;
    --size_;
  }

 private:
  struct Link {
    Page previous = kNoPage;
    Page next = kNoPage;
    bool linked = false;
  };

  Link& link(Page page) { return links_[static_cast<size_t>(page)]; }
  const Link& link(Page page) const { return links_[static_cast<size_t>(page)]; }

  std::vector<Link> links_;
  Page sentinel_;
  int32_t size_ = 0;
};

}  // namespace kelix::host
