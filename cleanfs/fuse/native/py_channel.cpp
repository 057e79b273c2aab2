#include "py_channel.hpp"

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "raise_errno.hpp"

namespace cleanfs {

std::optional<nb::object> PyChannel::receive_now() {
    end_synced();
    return receive_by([&] { return channel_.receive_now(fast_path_.get()); });
}

std::optional<nb::object> PyChannel::receive(double until_seconds) {
    const auto ns = static_cast<std::int64_t>(std::clamp(until_seconds, 0.0, 1e6) * 1e9);
    return receive_by([&] {
        nb::gil_scoped_release unlocked;  // while it polls, serves or sleeps, worker threads run
        return channel_.receive(now_ns() + ns, fast_path_.get());
    });
}

template <class Receive>
std::optional<nb::object> PyChannel::receive_by(Receive&& receive) {
    message_.reset();
    try {
        message_ = receive();
    } catch (const std::system_error& error) {
        raise_errno(error.code().value());
    }
    if (!message_) return std::nullopt;
    Request request(*message_);
    if (!message_->has_reply()) return nb::cast(std::move(request));
    return requests_.add(message_->header().unique, std::move(request));
}

nb::bytes PyChannel::body() const {
    if (!message_) throw nb::value_error("nothing was received");
    return nb::bytes(message_->body().data(), message_->body().size());
}

bool PyChannel::reply(std::uint64_t unique, int error, const nb::bytes& body) {
    const Sent sent = channel_.reply(unique, error, {static_cast<const std::byte*>(body.data()), body.size()});
    if (sent == Sent::failed) raise_errno(errno);
    return sent == Sent::taken;
}

nb::object PyChannel::request(std::uint64_t unique) {
    nb::object found = requests_.find(unique);
    if (!found.is_none()) return found;
    end_synced();
    const fuse_in_header* header = fast_path_.get() == nullptr ? nullptr : fast_path_.get()->syncing(unique);
    return header == nullptr ? nb::none() : requests_.add(unique, Request(*header));
}

std::size_t PyChannel::syncing() {
    end_synced();
    return fast_path_.get() == nullptr ? 0 : fast_path_.get()->syncing();
}

// FSYNCs that Python has asked for were requests in progress, and are no more.
void PyChannel::end_synced() {
    if (fast_path_.get() == nullptr) return;
    for (const auto& [unique, refused] : fast_path_.get()->take_synced()) {
        const nb::object request = requests_.take(unique);
        if (refused) requests_.roll_back(request);
    }
}

}  // namespace cleanfs
