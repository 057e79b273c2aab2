#include "loans.hpp"

#include <algorithm>
#include <new>

namespace zcache {

bool Loans::reserve() {
    try {
        if (free_.empty()) {
            if (loans_.size() == loans_.capacity()) loans_.reserve(std::max(2 * loans_.size(), std::size_t{16}));
            if (free_.capacity() < loans_.capacity()) free_.reserve(loans_.capacity());
            free_.push_back(static_cast<Number>(loans_.size()));
            loans_.emplace_back();
        }
        std::size_t tokens = returned_.size() + count() + 1;
        if (returned_.capacity() < tokens) returned_.reserve(2 * tokens);
    } catch (const std::bad_alloc&) {
        return false;
    }
    return true;
}

void Loans::shrink_tables() {
    std::vector<Loan>().swap(loans_);
    std::vector<Number>().swap(free_);
}

Loans::Number Loans::add(Token token, Slot slot, Owner owner, std::uint32_t page_size) {
    Number number = free_.back();
    free_.pop_back();
    loans_[number] = {token, slot, owner, page_size, youngest_, none};
    (youngest_ == none ? oldest_ : loans_[youngest_].younger) = number;
    youngest_ = number;
    page_bytes_ += page_size;
    return number;
}

Loans::Loan Loans::end(Number number) {
    Loan loan = loans_[number];
    (loan.older == none ? oldest_ : loans_[loan.older].younger) = loan.younger;
    (loan.younger == none ? youngest_ : loans_[loan.younger].older) = loan.older;
    loans_[number] = Loan{};
    free_.push_back(number);
    page_bytes_ -= loan.page_size;
    returned_.push_back(loan.token);
    return loan;
}

}  // namespace zcache
