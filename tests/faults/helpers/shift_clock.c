// Preloaded into a process: once the file named by SHIFT_CLOCK_TRIGGER exists, its wall clock is an hour behind.
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { kShiftSeconds = 3600 };

static int shifted(void) {
  const char* trigger = getenv("SHIFT_CLOCK_TRIGGER");
  return trigger != NULL && access(trigger, F_OK) == 0;
}

int clock_gettime(clockid_t clock, struct timespec* now) {
  const long failed = syscall(SYS_clock_gettime, clock, now);
  if (failed == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) && shifted()) {
    now->tv_sec -= kShiftSeconds;
  }
  return (int)failed;
}

int gettimeofday(struct timeval* restrict now, void* restrict zone) {
  (void)zone;
  struct timespec precise;
  if (clock_gettime(CLOCK_REALTIME, &precise) != 0) return -1;
  now->tv_sec = precise.tv_sec;
  now->tv_usec = precise.tv_nsec / 1000;
  return 0;
}

time_t time(time_t* result) {
  struct timespec precise;
  if (clock_gettime(CLOCK_REALTIME, &precise) != 0) return (time_t)-1;
  if (result != NULL) *result = precise.tv_sec;
  return precise.tv_sec;
}
