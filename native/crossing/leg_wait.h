// Leg's waiting, for its own sources.
#ifndef LAUNCHER_CROSSING_LEG_WAIT_H
#define LAUNCHER_CROSSING_LEG_WAIT_H

#include "leg.h"

namespace launcher::crossing {

// A call of one thread.
class Leg::Turn {
 public:
  explicit Turn(Leg& leg) : lock_(checked(leg).turn_) {
    if (leg.closed_) {
      throw LegFailure(-1, Kind::closed, "the connections were closed");
    }
  }

 private:
  // Before the lock, which another thread may have held when the process was forked.
  static Leg& checked(Leg& leg) {
    if (leg.forked()) {
      throw LegFailure(leg.options_.rank, Kind::closed,
                       "the connections belong to the process that made them; this is a fork of it");
    }
    return leg;
  }

  std::lock_guard<std::mutex> lock_;
};

// Moves what there is to move until done(). culprit(): the peer that is waited for now. `streams`: on its streams, else
// on its control connection.
template <typename Done, typename Culprit>
void Leg::await(bool streams, Done done, Culprit culprit) {
  if (done()) {
    return;
  }
  Patience patience;
  for (;;) {
    const bool moved = streams ? move_streams() : move_controls();
    if (done()) {
      return;
    }
    if (moved) {
      patience.idle = false;
      glance(patience, culprit());
    } else {
      pause(patience, streams, culprit());
    }
  }
}

}  // namespace launcher::crossing

#endif
