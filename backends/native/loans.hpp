// Loans: stored pages that an exclusive get handed out, kept in case the same page comes back.
//
// A page that was got is gone for every get. But most come back unchanged, when the page cache evicts
// them again, and compressing is five times the work of decompressing. So the stored form waits, with a
// token for the very page handed out. A put of the page with that token revives it: no compressing, no
// comparing, no doubt. A caller must not use a token for another page until it was given back.
#pragma once

#include <cstdint>
#include <vector>

#include "slot.hpp"

namespace zcache {

using Token = std::uint64_t;
inline constexpr Token no_token = 0;

class Loans {
public:
    using Number = std::uint32_t;

    struct Loan {
        Token token = no_token;
        Slot slot = Slot::stored(0, Kind::raw);  // before the loan: stored or staged
        Owner owner;
        std::uint32_t page_size = 0;
        Number older = none, younger = none;
    };

    // Set memory aside for one more loan and its token's return. False if there is none.
    bool reserve();
    // Only after reserve().
    Number add(Token token, Slot slot, Owner owner, std::uint32_t page_size);
    Loan& at(Number number) { return loans_[number]; }
    // End a loan and give its token back.
    Loan end(Number number);

    bool empty() const { return oldest_ == none; }
    Number oldest() const { return oldest_; }
    std::size_t count() const { return loans_.size() - free_.size(); }
    // Bytes of the pages that are lent.
    std::size_t page_bytes() const { return page_bytes_; }
    // Bytes of the records.
    std::size_t bytes() const { return loans_.capacity() * sizeof(Loan) + free_.capacity() * sizeof(Number); }

    // Release the tables. There must be no loans.
    void shrink_tables();

    // Tokens given back and not yet collected. Its capacity suffices for all outstanding loans.
    std::vector<Token>& returned() { return returned_; }

private:
    static constexpr Number none = ~Number{0};

    std::vector<Loan> loans_;
    std::vector<Number> free_;
    std::vector<Token> returned_;
    Number oldest_ = none, youngest_ = none;
    std::size_t page_bytes_ = 0;
};

}  // namespace zcache
