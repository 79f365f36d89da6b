// A group of which each rank is a thread of this process.
#ifndef LAUNCHER_TESTS_RANK_THREADS_H
#define LAUNCHER_TESTS_RANK_THREADS_H

#include <cstdio>
#include <exception>
#include <memory>
#include <thread>
#include <vector>

#include "check.h"
#include "launcher/collectives.h"

// `work` of each rank in a thread of its own; what one throws is a failure of the test.
template <typename Work>
void in_threads(int size, const launcher::collectives::Options& options, Work work) {
  using launcher::collectives::Group;
  std::vector<std::unique_ptr<Group>> groups = Group::join_threads(size, options);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      Group& group = *groups[static_cast<std::size_t>(rank)];
      CHECK(group.rank() == rank && group.size() == size);
      try {
        work(group);
      } catch (const std::exception& error) {
        std::fprintf(stderr, "rank %d of %d: %s\n", rank, size, error.what());
        CHECK(!"a rank threw");
        group.abort(error.what());
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

#endif
