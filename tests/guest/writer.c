/* A provable write log.
 *
 *   writer write --seed S [--from N] [--count C] [--seconds T] [--flight Q] [--pause USEC] [--progress FILE]
 *                [--buffered] DISK...
 *   writer check --seed S [--flight Q] [--at-least N] [--at-most N] [--show K] DISK...
 *
 * `write` makes the writes 1, 2, 3, ... (after --from N: N+1, ...), one sequence across all disks, which start as
 * zeros. Where write n goes and what it holds follows from the seed, n and the disks' sizes alone, so nothing but the
 * seed has to be kept to know every byte of the disks after any n. A DISK is a block device or a file of its final size.
 *
 * `check` says for which N the disks are exactly as they were after write N and before write N+1, or where not: both
 * disks of a restored machine must be of one instant. It is the same program, so that it runs on the host on restored
 * images and inside the restored guest on its devices. With --flight Q (as in `write`) up to Q writes may have been on
 * their way at the instant: of the Q up to N each may be there or not; N itself and all older ones must be.
 *
 * Rules that make it a proof:
 *  - Write n starts only after all writes <= n - Q are complete (Q = 1: one at a time).
 *  - A write's place differs from those of the WINDOW - 1 writes before it, so that no two writes in flight meet.
 *  - --progress FILE always holds the last n for which all writes <= n are complete: a backup that starts after reading
 *    A and ends before reading B must have A <= N <= B + Q.
 *  - 7 of 8 writes go to the first 1/HOT of a disk, as real ones cluster; the rest go anywhere, the last block included.
 *
 * Block, 4096 bytes, 512 words of 64 bits, little-endian:
 *   magic | seed | n | disk | offset | words of (seed, n, place), the second half one repeated word | checksum
 *
 * Exit status: 0; 1 the check failed; 2 something else.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096
#define WORDS (BLOCK / 8)
#define MAGIC 0x676f6c6574697277ULL /* "writelog" */
#define WINDOW 32
#define HOT 16
#define MAX_DISKS 16
#define READ_BLOCKS 256

static struct {
  const char *path;
  int fd;
  uint64_t size, blocks;
} disk[MAX_DISKS];
static int disks;
static uint64_t seed, flight = 1;

static void die(const char *format, ...) {
  va_list list;
  va_start(list, format);
  fputs("writer: ", stderr);
  vfprintf(stderr, format, list);
  fputc('\n', stderr);
  va_end(list);
  exit(2);
}

/* splitmix64's finish */
static uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  return z ^ (z >> 31);
}

static uint64_t draw(uint64_t n, uint64_t k) { return mix(mix(seed ^ n * 0x9E3779B97F4A7C15ULL) + k); }

/* The places of the log, in order. */
struct place {
  int disk;
  uint64_t block;
};
static struct place recent[WINDOW];

static struct place next_place(uint64_t n) {
  for (uint64_t k = 0;; k += 2) {
    uint64_t a = draw(n, k), b = draw(n, k + 1);
    struct place p = {(int)(a % (uint64_t)disks), 0};
    uint64_t blocks = disk[p.disk].blocks, hot = blocks / HOT > WINDOW ? blocks / HOT : blocks;
    p.block = b % ((a >> 32) % 8 ? hot : blocks);
    int met = 0;
    for (uint64_t i = n > WINDOW - 1 ? n - (WINDOW - 1) : 1; i < n; i++)
      met |= recent[i % WINDOW].disk == p.disk && recent[i % WINDOW].block == p.block;
    if (!met) return recent[n % WINDOW] = p;
  }
}

static uint64_t checksum(const uint64_t *w) {
  uint64_t sum = MAGIC;
  for (int i = 0; i < WORDS - 1; i++) sum = (sum ^ w[i]) * 0x100000001B3ULL, sum ^= sum >> 29;
  return sum;
}

static void make_block(uint64_t *w, uint64_t n, int d, uint64_t block) {
  w[0] = MAGIC, w[1] = seed, w[2] = n, w[3] = (uint64_t)d, w[4] = block * BLOCK;
  uint64_t base = draw(n, 1000 + (uint64_t)d) ^ block;
  for (int i = 5; i < WORDS / 2; i++) w[i] = mix(base + (uint64_t)i);
  for (int i = WORDS / 2; i < WORDS - 1; i++) w[i] = base;
  w[WORDS - 1] = checksum(w);
}

static void open_disks(char **paths, int flags) {
  for (; *paths; paths++, disks++) {
    if (disks == MAX_DISKS) die("more than %d disks", MAX_DISKS);
    disk[disks].path = *paths;
    disk[disks].fd = open(*paths, flags | O_CLOEXEC);
    off_t size = disk[disks].fd < 0 ? -1 : lseek(disk[disks].fd, 0, SEEK_END);
    if (size < 0) die("%s: %s%s", *paths, strerror(errno), flags & O_DIRECT ? " (without O_DIRECT: --buffered)" : "");
    disk[disks].size = (uint64_t)size, disk[disks].blocks = (uint64_t)size / BLOCK;
    if (disk[disks].blocks < 2 * WINDOW) die("%s: smaller than %d blocks of 4 KiB", *paths, 2 * WINDOW);
  }
  if (!disks) die("no disk is named");
}

/* ---- write ---- */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t moved = PTHREAD_COND_INITIALIZER;
static uint64_t issued, complete, last, pause_us;
static unsigned char done[WINDOW]; /* done[n % WINDOW]: write n, complete < n <= issued, is done */
static int progress = -1;
static double end_time;
static volatile sig_atomic_t stop_asked;

static void on_signal(int signal) { (void)signal, stop_asked = 1; }

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void show_progress(void) {
  char text[24];
  int len = snprintf(text, sizeof text, "%020llu\n", (unsigned long long)complete);
  if (progress >= 0 && pwrite(progress, text, (size_t)len, 0) != len) die("the progress file: %s", strerror(errno));
}

static void *write_some(void *unused) {
  uint64_t *buffer;
  (void)unused;
  if (posix_memalign((void **)&buffer, BLOCK, BLOCK)) die("out of memory");
  pthread_mutex_lock(&lock);
  for (;;) {
    while (issued >= complete + flight && !stop_asked) pthread_cond_wait(&moved, &lock);
    if (stop_asked || issued >= last || (end_time > 0 && now() >= end_time)) break;
    uint64_t n = ++issued;
    struct place p = next_place(n);
    pthread_mutex_unlock(&lock);
    make_block(buffer, n, p.disk, p.block);
    ssize_t put = pwrite(disk[p.disk].fd, buffer, BLOCK, (off_t)(p.block * BLOCK));
    if (put != BLOCK) die("write %llu, %s at %llu: %s", (unsigned long long)n, disk[p.disk].path,
                          (unsigned long long)(p.block * BLOCK), put < 0 ? strerror(errno) : "short");
    if (pause_us) usleep((useconds_t)pause_us);
    pthread_mutex_lock(&lock);
    done[n % WINDOW] = 1;
    while (complete < issued && done[(complete + 1) % WINDOW]) done[++complete % WINDOW] = 0;
    show_progress();
    pthread_cond_broadcast(&moved);
  }
  pthread_cond_broadcast(&moved);
  pthread_mutex_unlock(&lock);
  free(buffer);
  return NULL;
}

static int write_log(uint64_t from, uint64_t count, double seconds) {
  struct sigaction action = {.sa_handler = on_signal};
  pthread_t thread[WINDOW];
  sigaction(SIGTERM, &action, NULL), sigaction(SIGINT, &action, NULL);
  for (uint64_t n = 1; n <= from; n++) next_place(n);
  issued = complete = from, last = count ? from + count : UINT64_MAX;
  double start = now();
  if (seconds > 0) end_time = start + seconds;
  show_progress();
  printf("writing on %d disks from write %llu on, %llu in flight\n", disks, (unsigned long long)from + 1,
         (unsigned long long)flight);
  fflush(stdout);
  for (uint64_t i = 0; i < flight; i++)
    if (pthread_create(&thread[i], NULL, write_some, NULL)) die("no thread");
  for (uint64_t i = 0; i < flight; i++) pthread_join(thread[i], NULL);
  for (int d = 0; d < disks; d++)
    if (fsync(disk[d].fd)) die("%s: %s", disk[d].path, strerror(errno));
  printf("stopped after write %llu, %.0f writes a second\n", (unsigned long long)complete,
         (double)(complete - from) / (now() - start + 1e-9));
  return 0;
}

/* ---- check ---- */

/* What a block was found to hold: 0 nothing, a write's number, or one of these. */
#define DAMAGED UINT64_MAX
#define ELSEWHERE (UINT64_MAX - 1)
#define FOREIGN (UINT64_MAX - 2)

static uint64_t *found[MAX_DISKS], *must[MAX_DISKS], *may[MAX_DISKS];

static uint64_t look(const uint64_t *w, int d, uint64_t block) {
  uint64_t expected[WORDS];
  if (w[0] == 0 && !memcmp(w, w + 1, BLOCK - 8)) return 0;
  if (w[0] == MAGIC && w[1] == seed && w[2] > 0 && w[2] < FOREIGN) {
    make_block(expected, w[2], d, block);
    if (!memcmp(expected, w, BLOCK)) return w[2];
    return checksum(w) == w[WORDS - 1] ? ELSEWHERE : DAMAGED;
  }
  return FOREIGN;
}

static void read_disk(int d) {
  uint64_t *buffer;
  if (posix_memalign((void **)&buffer, BLOCK, READ_BLOCKS * BLOCK)) die("out of memory");
  for (uint64_t at = 0; at < disk[d].size; at += READ_BLOCKS * BLOCK) {
    uint64_t len = disk[d].size - at < READ_BLOCKS * BLOCK ? disk[d].size - at : READ_BLOCKS * BLOCK;
    off_t data = lseek(disk[d].fd, (off_t)at, SEEK_DATA);
    if ((data < 0 && errno == ENXIO) || (data >= 0 && (uint64_t)data >= at + len)) continue; /* a hole: zeros */
    memset(buffer, 0, READ_BLOCKS * BLOCK);
    for (uint64_t got = 0; got < len;) {
      ssize_t more = pread(disk[d].fd, (char *)buffer + got, len - got, (off_t)(at + got));
      if (more <= 0) die("%s at %llu: %s", disk[d].path, (unsigned long long)(at + got),
                         more ? strerror(errno) : "unexpected end");
      got += (uint64_t)more;
    }
    for (uint64_t i = 0; i < len / BLOCK; i++)
      found[d][at / BLOCK + i] = look(buffer + i * WORDS, d, at / BLOCK + i);
    if (len % BLOCK) /* a last partial block is never written */
      found[d][disk[d].blocks] = look(buffer + len / BLOCK * WORDS, d, disk[d].blocks) ? FOREIGN : 0;
  }
  free(buffer);
}

/* must: the log up to write `settled`; may: up to `newest`. */
static void replay(uint64_t settled, uint64_t newest) {
  for (int d = 0; d < disks; d++) memset(must[d], 0, 8 * (disk[d].blocks + 1)), memset(may[d], 0, 8 * (disk[d].blocks + 1));
  for (uint64_t n = 1; n <= newest; n++) {
    struct place p = next_place(n);
    may[p.disk][p.block] = n;
    if (n <= settled) must[p.disk][p.block] = n;
  }
}

static const char *say(uint64_t what) {
  static char text[2][40];
  static int turn;
  char *t = text[turn ^= 1];
  if (what == 0) return "zeros";
  if (what == DAMAGED) return "a damaged block of the log";
  if (what == ELSEWHERE) return "a block of another place of the log";
  if (what == FOREIGN) return "bytes that are not of this log";
  snprintf(t, sizeof text[0], "write %llu", (unsigned long long)what);
  return t;
}

static uint64_t compare(int d, uint64_t show) {
  uint64_t wrong = 0;
  for (uint64_t b = 0; b <= disk[d].blocks; b++) {
    if (found[d][b] == must[d][b] || found[d][b] == may[d][b]) continue;
    if (wrong++ < show)
      printf("  disk %d (%s), offset %llu: %s, where %s belongs\n", d, disk[d].path, (unsigned long long)(b * BLOCK),
             say(found[d][b]), say(may[d][b]));
  }
  return wrong;
}

static int check_log(uint64_t at_least, uint64_t at_most, uint64_t show) {
  uint64_t newest[MAX_DISKS] = {0}, all = 0, wrong = 0, present = 0;
  for (int d = 0; d < disks; d++) {
    uint64_t room = disk[d].blocks + 1;
    found[d] = calloc(room, 8), must[d] = calloc(room, 8), may[d] = calloc(room, 8);
    if (!found[d] || !must[d] || !may[d]) die("out of memory");
    read_disk(d);
    for (uint64_t b = 0; b < disk[d].blocks; b++)
      if (found[d][b] < FOREIGN) present += found[d][b] > 0, newest[d] = found[d][b] > newest[d] ? found[d][b] : newest[d];
    if (newest[d] > all) all = newest[d];
  }
  replay(all > flight ? all - flight : 0, all);
  for (int d = 0; d < disks; d++) {
    uint64_t bad = compare(d, wrong < show ? show - wrong : 0);
    wrong += bad;
    if (bad) printf("  disk %d (%s): %llu blocks differ from the disk after write %llu\n", d, disk[d].path,
                    (unsigned long long)bad, (unsigned long long)all);
  }
  if (wrong) { /* Is each disk of an instant of its own? */
    for (int d = 0; d < disks; d++) {
      replay(newest[d] > flight ? newest[d] - flight : 0, newest[d]);
      uint64_t bad = compare(d, 0);
      printf("  disk %d alone: newest is write %llu, %s\n", d, (unsigned long long)newest[d],
             bad ? "and it is of no one instant" : "and it is as it was after that write");
    }
    printf("FAILED: no one instant: %llu blocks differ from the log up to write %llu\n", (unsigned long long)wrong,
           (unsigned long long)all);
    return 1;
  }
  if (all < at_least || all > at_most) {
    printf("FAILED: the disks are as they were after write %llu, which is not in %llu..%llu\n", (unsigned long long)all,
           (unsigned long long)at_least, (unsigned long long)at_most);
    return 1;
  }
  printf("proved: N=%llu on %d disks, %llu blocks\n", (unsigned long long)all, disks, (unsigned long long)present);
  return 0;
}

int main(int count, char **argument) {
  uint64_t from = 0, writes = 0, at_least = 0, at_most = UINT64_MAX, show = 8;
  double seconds = 0;
  int direct = O_DIRECT, i, have_seed = 0;
  if (count < 2) die("write or check?");
  int checking = !strcmp(argument[1], "check");
  if (!checking && strcmp(argument[1], "write")) die("%s: write or check?", argument[1]);
  for (i = 2; i < count && !strncmp(argument[i], "--", 2); i++) {
    const char *name = argument[i] + 2;
    if (!strcmp(name, "buffered")) { direct = 0; continue; }
    if (++i == count) die("--%s wants a value", name);
    char *end, *value = argument[i];
    uint64_t number = strtoull(value, &end, 10);
    if (!strcmp(name, "progress")) {
      progress = open(value, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
      if (progress < 0) die("%s: %s", value, strerror(errno));
      continue;
    }
    if (*end || !*value) die("--%s %s: not a number", name, value);
    if (!strcmp(name, "seed")) seed = number, have_seed = 1;
    else if (!strcmp(name, "flight")) flight = number;
    else if (!strcmp(name, "from")) from = number;
    else if (!strcmp(name, "count")) writes = number;
    else if (!strcmp(name, "seconds")) seconds = (double)number;
    else if (!strcmp(name, "pause")) pause_us = number;
    else if (!strcmp(name, "at-least")) at_least = number;
    else if (!strcmp(name, "at-most")) at_most = number;
    else if (!strcmp(name, "show")) show = number;
    else die("--%s is unknown", name);
  }
  if (!have_seed) die("--seed is missing");
  if (flight < 1 || flight > WINDOW - 1) die("--flight is 1 to %d", WINDOW - 1);
  if (checking) {
    open_disks(argument + i, O_RDONLY);
    return check_log(at_least, at_most, show);
  }
  open_disks(argument + i, O_RDWR | direct);
  return write_log(from, writes, seconds);
}
