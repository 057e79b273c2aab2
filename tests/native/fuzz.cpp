// Turn input into operations on a small engine, or into a page to decompress. The input comes from libFuzzer
// or a random generator.
#include <chrono>
#include <memory>

#include "guarded.hpp"
#include "fuzz_main.hpp"
#include "machine.hpp"

namespace {

// Takes choices from the input, and zeros once it is used up.
class Input final : public Choices {
public:
    Input(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

    std::uint64_t below(std::uint64_t end) override {
        std::uint64_t value = 0;
        for (std::uint64_t most = end - 1; most > 0 && size_ > 0; most >>= 8, ++data_, --size_) {
            value = value << 8 | *data_;
        }
        return value % end;
    }
    bool over() const { return size_ == 0; }

private:
    const std::uint8_t* data_;
    std::size_t size_;
};

void decompress(zcache::Method method, zcache::Bytes in) {
    struct Decoder {
        explicit Decoder(zcache::Method of)
            : codec({of, 1, false}), scratch(codec, zcache::Scratch::Use::decompress) {}
        zcache::Codec codec;
        zcache::Scratch scratch;
    };
    static Decoder decoders[] = {Decoder(zcache::Method::none), Decoder(zcache::Method::lz4),
                                 Decoder(zcache::Method::lz4hc), Decoder(zcache::Method::zstd)};
    static const Guarded out(4096);
    static const Guarded room(1 << 16);
    if (in.size() > room.bytes().size()) return;
    // At the very end of its memory: reading beyond it fails like writing beyond `out`.
    zcache::MutableBytes input = room.bytes().last(in.size());
    std::copy(in.begin(), in.end(), input.begin());
    Decoder& decoder = decoders[static_cast<std::size_t>(method)];
    decoder.codec.decompress(decoder.scratch, input, false, out.bytes());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    if (size == 0) return 0;
    if (data[0] >= 252) {
        decompress(static_cast<zcache::Method>(data[0] & 3), std::as_bytes(std::span(data + 1, size - 1)));
        return 0;
    }
    Input input(data, size);
    Scarcity none;
    Machine machine(choose_options(input, true), input, none);
    while (!input.over()) machine.step();
    machine.finish();
    return 0;
}

#ifndef LIBFUZZER
int main(int argc, char** argv) {
    fuzz("fuzz", argc, argv, 4096, 1, [](Random& random) { return random.next(); });
}
#endif
