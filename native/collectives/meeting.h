// How the processes of a group find each other and come to share one segment: over a UNIX socket in a folder that only
// this user may enter. The first rank listens, the others come; when all are there each gets the segment, the processes
// of the others and a mailbox for descriptors of memory that is registered later. The socket's name is then removed.
// Only when all have taken what they got is the group made: what fails until then fails on all ranks, with the same
// reason.
#ifndef LAUNCHER_COLLECTIVES_MEETING_H
#define LAUNCHER_COLLECTIVES_MEETING_H

#include <memory>
#include <vector>

#include "launcher/collectives.h"
#include "segment.h"
#include "system.h"

namespace launcher::collectives {

struct Meeting {
  std::unique_ptr<Segment> segment;
  std::vector<Process> processes;    // by rank in the group; this one's is empty
  Descriptor inbox;                  // what others send to this rank
  std::vector<Descriptor> outboxes;  // by rank
};

// Throws GroupError with operation "join" and number 0, std::system_error, std::invalid_argument.
Meeting meet(const Options& options, std::size_t slot_bytes);

// "ranks 1, 2" as the job numbers them.
int job_rank(const Options& options, int rank) noexcept;
std::string place_of(const Options& options, int rank);  // "rank 3 on algo-2"

}  // namespace launcher::collectives

#endif
