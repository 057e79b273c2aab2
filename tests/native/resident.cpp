// Run random operations on the resident pages and compare them with a map: which pages are resident, which
// file owns them, and that each page is released exactly once. tests/cache/test_resident.py compares the
// order of eviction.
#include <algorithm>
#include <chrono>
#include <map>
#include <set>

#include "pages.hpp"
#include "resident.hpp"

namespace {

using cleanfs::PageIndex;
using cleanfs::Resident;

std::set<Resident::Page> alive;  // pages held by the table

Resident::Page new_page() {
    return new std::uint64_t{0};
}

void release(Resident::Page page) {
    EXPECT(alive.erase(page) == 1);
    delete static_cast<std::uint64_t*>(page);
}

using Model = std::map<std::pair<Resident::Serial, PageIndex>, Resident::Page>;

void run(Random& choices) {
    Resident resident(release);
    Model model;
    auto index = [&] {
        switch (choices.below(4)) {
            case 0: return choices.below(1000);
            case 1: return (std::uint64_t{1} << 45) + choices.below(200);
            default: return choices.below(100);
        }
    };
    for (std::uint64_t left = 2000 + choices.below(4000); left > 0; --left) {
        Resident::Serial file = 1 + choices.below(5);
        switch (choices.below(8)) {
            case 0: case 1: case 2: {
                PageIndex at = index();
                Resident::Page page = new_page();
                if (resident.insert(file, at, page)) {
                    EXPECT(model.emplace(std::pair{file, at}, page).second);
                    alive.insert(page);
                } else {
                    EXPECT(model.contains({file, at}));
                    delete static_cast<std::uint64_t*>(page);
                }
                break;
            }
            case 3: case 4: {
                PageIndex first = index();
                std::size_t count = choices.below(70), missing = 0;
                std::vector<Resident::Page> pages(count);
                std::size_t said = resident.look_up(file, first, count, pages.data());
                for (std::size_t at = 0; at < count; ++at) {
                    auto found = model.find({file, first + at});
                    EXPECT(pages[at] == (found == model.end() ? nullptr : found->second));
                    missing += pages[at] == nullptr;
                }
                EXPECT(said == missing);
                break;
            }
            case 5: case 6: {
                std::size_t before = resident.size(), count = choices.below(40);
                auto victims = resident.evict(count);
                EXPECT(victims.size() == std::min(before, count) && resident.size() == before - victims.size());
                for (auto& victim : victims) {
                    auto found = model.find({victim.file, victim.index});
                    EXPECT(found != model.end() && found->second == victim.page);
                    model.erase(found);
                    release(victim.page);
                }
                break;
            }
            default: {
                PageIndex first = index(), stop = choices.below(2) ? ~PageIndex{0} : first + choices.below(300);
                resident.discard(file, first, stop);
                std::erase_if(model, [&](const auto& item) {
                    return item.first.first == file && item.first.second >= first && item.first.second < stop;
                });
            }
        }
        EXPECT(resident.size() == model.size() && alive.size() == model.size());
        if (left % 64 == 0) resident.check();
    }
    resident.check();
    for (Resident::Serial file = 1; file <= 5; ++file) {
        std::vector<PageIndex> listed, expected;
        resident.for_each(file, [&](PageIndex at) { listed.push_back(at); });
        for (const auto& [where, page] : model) {
            if (where.first == file) expected.push_back(where.second);
        }
        EXPECT(listed == expected);
    }
}

}  // namespace

int main(int argc, char** argv) {
    Arguments arguments(argc, argv);
    auto start = std::chrono::steady_clock::now();
    std::uint64_t seed = arguments.seed;
    do {
        Random choices(seed);
        std::printf("resident: --seconds 0 --seed %llu\n", static_cast<unsigned long long>(seed));
        std::fflush(stdout);
        run(choices);
        EXPECT(alive.empty());
        ++seed;
    } while (std::chrono::steady_clock::now() - start < std::chrono::duration<double>(arguments.seconds));
    std::printf("resident: %llu runs\n", static_cast<unsigned long long>(seed - arguments.seed));
}
