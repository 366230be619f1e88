/* The job of every program that is compared: notes when it began and when it ended.
 *
 *   probe TRACE NAME MILLISECONDS [GATE]
 *
 * Appends "begin NAME seconds" and "end NAME seconds" (CLOCK_MONOTONIC) to TRACE and prints NAME.
 * With GATE, a FIFO, it stays until somebody opens that for writing.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static void note(int trace, const char *what, const char *name, struct timespec at) {
    char line[512];
    int size = snprintf(line, sizeof line, "%s %s %lld.%09ld\n", what, name,
                        (long long)at.tv_sec, at.tv_nsec);
    if (write(trace, line, (size_t)size) != size) exit(3);
}

int main(int argc, char **argv) {
    struct timespec at, hold;
    clock_gettime(CLOCK_MONOTONIC, &at);
    if (argc < 4) return 2;
    int trace = open(argv[1], O_WRONLY | O_APPEND | O_CREAT, 0600);
    if (trace < 0) return 3;
    note(trace, "begin", argv[2], at);
    puts(argv[2]);
    fflush(stdout);
    if (argc > 4 && open(argv[4], O_RDONLY) < 0) return 4;
    long ms = atol(argv[3]);
    hold.tv_sec = ms / 1000, hold.tv_nsec = ms % 1000 * 1000000;
    nanosleep(&hold, 0);
    clock_gettime(CLOCK_MONOTONIC, &at);
    note(trace, "end", argv[2], at);
    return 0;
}
