#include "staging.hpp"

#include <cstring>

namespace zcache {

Staging::Staging(Budget& budget, std::size_t bytes)
    : ring_(Mapping::populated(budget, round_up(bytes, min_page_size))), pages_(ring_.size() / min_page_size) {}

std::optional<Staging::Sequence> Staging::push(Owner owner, Bytes page) {
    if (back_ - front_ == pages_.size()) return std::nullopt;
    std::size_t at = head_ % ring_.size();
    // A page is contiguous: the rest of the ring before its end may have to be skipped.
    std::size_t skip = at + page.size() <= ring_.size() ? 0 : ring_.size() - at;
    if (page.size() > ring_.size() || head_ + skip + page.size() - tail_ > ring_.size()) return std::nullopt;
    head_ += skip;
    std::byte* data = ring_.data() + head_ % ring_.size();
    std::memcpy(data, page.data(), page.size());
    head_ += page.size();
    this->at(back_) = {owner, static_cast<std::uint32_t>(page.size()), head_, data};
    return back_++;
}

void Staging::pop_front() {
    tail_ = at(front_).end;
    ++front_;
    if (empty()) tail_ = head_;
}

}  // namespace zcache
