// Allreduce between the ranks of a column, one on each host.
//
// Short messages go beside the call to all others, and everybody folds. Long ones are cut into pieces: with two hosts,
// or where the wire is not the limit, all of them go to everybody (allreduce_direct); else every host owns a part,
// folds it and sends the result round (allreduce_owners), which carries 2 (H-1)/H of the message in place of H-1. Each
// element is folded once, with all hosts' parts in the order of the hosts: the same bits whatever comes first.
#include <algorithm>
#include <cstring>

#include "leg_wait.h"

namespace launcher::crossing {
namespace {

// Pieces that may come before they are folded, of each peer. They stay in the cache.
constexpr std::size_t kWindow = 8;
// To so many bytes, all other hosts' together, a message goes to all of them at once.
constexpr std::size_t kDirectBytes = 1024 * 1024;
// Of all peers' pieces that have come and are not folded.
constexpr std::size_t kMostScratch = 16 * 1024 * 1024;
constexpr std::size_t kLeastPiece = 8 * 1024;

}  // namespace

std::byte* Leg::scratch(std::size_t bytes) {
  if (bytes > scratch_bytes_) {
    scratch_ = std::make_unique_for_overwrite<std::byte[]>(bytes);
    scratch_bytes_ = bytes;
  }
  return scratch_.get();
}

// What this rank sends, where that is not `source` itself.
const void* Leg::scaled(const Plan& plan, const void* source, std::size_t count) {
  const std::size_t bytes = count * plan.item;
  if (bytes > scaled_bytes_) {
    scaled_ = std::make_unique_for_overwrite<std::byte[]>(bytes);
    scaled_bytes_ = bytes;
  }
  void* const to = scaled_.get();
  plan.fold(&to, 1, &source, 1, count, plan.prescale == 1.0 ? nullptr : &plan.prescale, plan.early);
  return to;
}

Pending Leg::send_part(int peer, const std::byte* address, std::size_t bytes, Lane lane) {
  sent_bytes_ += bytes;
  ++messages_;
  return link(peer).send(address, bytes, static_cast<std::uint32_t>(lane));
}

void Leg::announce(const Header& header) {
  for (const Link* one : by_host_) {
    if (one != nullptr) {
      send_call(header, nullptr, 0, one->peer());
    }
  }
}

void Leg::check_calls(const Header& header) {
  for (Link* one : by_host_) {
    if (one != nullptr) {
      await(
          true,
          [&] {
            one->receive_control();
            return one->first_call() != nullptr;
          },
          [&] { return one->peer(); });
      take_call(header, one->peer(), 0);
      one->free_call();
    }
  }
  flush_calls();
}

void Leg::finish(const Pending& request) {
  await(true, [&] { return request->done; }, [&] { return request->peer; });
}

void Leg::allreduce(const Plan& plan, std::uint64_t sequence, const void* source, void* target, std::size_t count) {
  const Turn turn(*this);
  Header header = plan.header;
  header.sequence = sequence;
  header.count = count;
  const std::size_t bytes = count * plan.item;
  if (plan.scaled()) {
    source = scaled(plan, source, count);
  }
  ++(bytes <= short_bytes_ ? short_calls_ : long_calls_);
  if (bytes <= short_bytes_) {
    allreduce_short(plan, header, source, target, count);
  } else if (by_host_.size() == 2 || bytes * (by_host_.size() - 1) <= kDirectBytes) {
    allreduce_direct(plan, header, static_cast<const std::byte*>(source), static_cast<std::byte*>(target), count);
  } else {
    allreduce_owners(plan, header, static_cast<const std::byte*>(source), static_cast<std::byte*>(target), count);
  }
}

void Leg::allreduce_short(const Plan& plan, const Header& header, const void* source, void* target, std::size_t count) {
  const std::size_t bytes = count * plan.item;
  const std::size_t hosts = by_host_.size();
  for (std::size_t step = 1; step < hosts; ++step) {  // not all to the first one first
    by_host_[(host_ + step) % hosts]->call(header, source, bytes);
    sent_bytes_ += sizeof header + bytes;
    ++messages_;
  }
  for (std::size_t host = 0; host < hosts; ++host) {
    sources_[host] = host == host_ ? source : take_call(header, column_[host], bytes);
  }
  plan.fold(&target, 1, sources_.data(), hosts, count, nullptr, plan.finish);
  for (Link* one : by_host_) {
    if (one != nullptr) {
      one->free_call();
    }
  }
  flush_calls();
}

void Leg::allreduce_direct(const Plan& plan, const Header& header, const std::byte* source, std::byte* target,
                           std::size_t count) {
  const std::size_t hosts = by_host_.size();
  const std::size_t step = kPieceBytes / plan.item;  // elements
  const std::size_t pieces = (count + step - 1) / step;
  std::byte* const room = scratch(kWindow * (hosts - 1) * kPieceBytes);
  struct Piece {
    std::vector<Pending> sends;
    std::vector<Pending> receives;  // by host, none of its own
  };
  std::vector<Piece> under_way(kWindow);
  const auto length = [&](std::size_t piece) { return std::min(step, count - piece * step); };
  const auto slot = [&](std::size_t piece, std::size_t host) {
    return room + ((piece % kWindow) * (hosts - 1) + (host < host_ ? host : host - 1)) * kPieceBytes;
  };
  const auto begin = [&](std::size_t piece) {
    Piece& one = under_way[piece % kWindow];
    one.sends.clear();
    one.receives.assign(hosts, nullptr);
    for (std::size_t turn = 1; turn < hosts; ++turn) {
      const std::size_t host = (host_ + turn) % hosts;
      const std::size_t bytes = length(piece) * plan.item;
      one.receives[host] = by_host_[host]->receive(slot(piece, host), bytes, static_cast<std::uint32_t>(Lane::data));
      one.sends.push_back(send_part(column_[host], source + piece * kPieceBytes, bytes, Lane::data));
    }
  };
  announce(header);
  for (std::size_t piece = 0; piece < std::min(kWindow, pieces); ++piece) {
    begin(piece);
  }
  check_calls(header);
  for (std::size_t piece = 0; piece < pieces; ++piece) {
    const Piece& one = under_way[piece % kWindow];
    move_streams();  // what was folded meanwhile is no time in which the wire may rest
    for (const Pending& send : one.sends) {
      finish(send);  // `source` may be `target`
    }
    for (std::size_t host = 0; host < hosts; ++host) {
      if (host != host_) {
        finish(one.receives[host]);
      }
      sources_[host] = host == host_ ? source + piece * kPieceBytes : slot(piece, host);
    }
    void* const to = target + piece * kPieceBytes;
    plan.fold(&to, 1, sources_.data(), hosts, length(piece), nullptr, plan.finish);
    if (piece + kWindow < pieces) {
      begin(piece + kWindow);
    }
  }
}

void Leg::allreduce_owners(const Plan& plan, const Header& header, const std::byte* source, std::byte* target,
                           std::size_t count) {
  const std::size_t hosts = by_host_.size();
  // A round is a piece of every host's part.
  const std::size_t fits = kMostScratch / (kWindow * (hosts - 1)) / kLeastPiece * kLeastPiece;
  const std::size_t piece_bytes = std::clamp(fits, kLeastPiece, kPieceBytes);
  const std::size_t step = piece_bytes / plan.item;
  const std::size_t rounds = (count + step * hosts - 1) / (step * hosts);
  std::byte* const room = scratch(kWindow * (hosts - 1) * piece_bytes);
  struct Round {
    std::vector<Pending> sends;
    std::vector<Pending> parts;    // by host, none of its own
    std::vector<Pending> results;  // of the other hosts
  };
  std::vector<Round> under_way(2 * kWindow);
  // The last round is shared out, too: nearly equal parts, in whole lines of the cache.
  const auto part = [&](std::size_t round, std::size_t host) {
    const std::size_t first = round * step * hosts;
    const std::size_t all = std::min(step * hosts, count - first);
    const std::size_t each = ((all + hosts - 1) / hosts + 63) / 64 * 64;
    const std::size_t from = std::min(all, host * each);
    return std::pair(first + from, std::min(all, from + each) - from);
  };
  const auto slot = [&](std::size_t round, std::size_t host) {
    return room + ((round % kWindow) * (hosts - 1) + (host < host_ ? host : host - 1)) * piece_bytes;
  };
  const auto begin = [&](std::size_t round) {
    Round& one = under_way[round % under_way.size()];
    one.sends.clear();
    one.results.clear();
    one.parts.assign(hosts, nullptr);
    const std::size_t mine = part(round, host_).second;
    for (std::size_t turn = 1; turn < hosts; ++turn) {
      const std::size_t host = (host_ + turn) % hosts;
      const auto [at, length] = part(round, host);
      if (mine != 0) {
        one.parts[host] =
            by_host_[host]->receive(slot(round, host), mine * plan.item, static_cast<std::uint32_t>(Lane::data));
      }
      if (length != 0) {
        one.results.push_back(by_host_[host]->receive(target + at * plan.item, length * plan.item,
                                                      static_cast<std::uint32_t>(Lane::results)));
        one.sends.push_back(send_part(column_[host], source + at * plan.item, length * plan.item, Lane::data));
      }
    }
  };
  const auto middle = [&](std::size_t round) {
    Round& one = under_way[round % under_way.size()];
    const auto [at, length] = part(round, host_);
    move_streams();
    if (length == 0) {
      return;
    }
    for (std::size_t host = 0; host < hosts; ++host) {
      if (host != host_) {
        finish(one.parts[host]);
      }
      sources_[host] = host == host_ ? source + at * plan.item : slot(round, host);
    }
    void* const to = target + at * plan.item;
    plan.fold(&to, 1, sources_.data(), hosts, length, nullptr, plan.finish);
    for (std::size_t turn = 1; turn < hosts; ++turn) {
      const std::size_t host = (host_ + turn) % hosts;
      one.sends.push_back(send_part(column_[host], target + at * plan.item, length * plan.item, Lane::results));
    }
  };
  const auto end = [&](std::size_t round) {
    const Round& one = under_way[round % under_way.size()];
    for (const Pending& request : one.results) {
      finish(request);
    }
    for (const Pending& request : one.sends) {
      finish(request);
    }
  };
  announce(header);
  for (std::size_t round = 0; round < std::min(kWindow, rounds); ++round) {
    begin(round);
  }
  check_calls(header);
  for (std::size_t round = 0; round < rounds; ++round) {
    middle(round);
    if (round + 1 >= kWindow) {
      end(round + 1 - kWindow);
    }
    if (round + kWindow < rounds) {
      begin(round + kWindow);
    }
  }
  for (std::size_t round = rounds - std::min(rounds, kWindow - 1); round < rounds; ++round) {
    end(round);
  }
}

}  // namespace launcher::crossing
