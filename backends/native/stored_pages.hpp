// Pages copied out of the engine as they are stored, to be decoded without its mutex.
#pragma once

#include <optional>
#include <vector>

#include "allocator.hpp"
#include "codec.hpp"

namespace zcache {

struct StoredPages {
    struct Page {
        bool staged = false;  // or stored
        Kind kind = Kind::raw;
        std::uint32_t checksum = 0;
        std::size_t offset = 0, size = 0;  // in `bytes`
    };

    void clear(std::uint32_t size_of_page) {
        page_size = size_of_page;
        pages.clear();
        bytes.clear();
    }
    void add_staged(Bytes page) { add({true}, page); }
    void add_stored(Kind kind, const Stored& stored) { add({false, kind, stored.checksum}, stored.bytes); }
    Bytes bytes_of(const Page& page) const { return Bytes(bytes).subspan(page.offset, page.size); }

    std::uint32_t page_size = 0;
    std::vector<Page> pages;
    std::vector<std::byte> bytes;
    std::optional<Scratch> scratch;  // of the thread that decodes

private:
    void add(Page page, Bytes from) {
        page.offset = bytes.size();
        page.size = from.size();
        bytes.insert(bytes.end(), from.begin(), from.end());
        pages.push_back(page);
    }
};

}  // namespace zcache
