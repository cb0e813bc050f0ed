/* Runs in a Linux guest: makes requests to a disk, several at a time, as it is told over a tty.
 *
 *     guest_agent DEVICE TTY NUMBER DISCARDS
 *
 * See clients.py for the lines, and content.py for what a sector holds. NUMBER is of the disk.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

enum { SECTOR = 512, LARGEST = 256, WORKERS = 6, QUEUE = 256, TIMES = SECTOR / 16 };

struct words {
    uint64_t number;
    uint32_t at, disk;
};

struct request {
    unsigned long id;
    char kind;
    uint32_t first, count;
    uint64_t number;
};

static struct request queue[QUEUE];
static unsigned head, tail;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t more = PTHREAD_COND_INITIALIZER;
static pthread_mutex_t tty_lock = PTHREAD_MUTEX_INITIALIZER;
static int device, tty;
static uint32_t disk;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void say(const char *text, size_t length)
{
    pthread_mutex_lock(&tty_lock);
    while (length) {
        ssize_t done = write(tty, text, length);
        if (done < 0)
            die("write to the tty");
        text += done;
        length -= (size_t)done;
    }
    pthread_mutex_unlock(&tty_lock);
}

static void fill(struct words *sectors, const struct request *r)
{
    for (uint32_t i = 0; i < r->count * TIMES; i++)
        sectors[i] = (struct words){r->number, r->first + i / TIMES, disk};
}

/* Which write a sector comes from: 0 for zeroes, -1 for nonsense. */
static int64_t number_of(const struct words *sector, uint32_t at)
{
    for (int i = 1; i < TIMES; i++)
        if (memcmp(sector, sector + i, sizeof *sector))
            return -1;
    if (!sector->number && !sector->at && !sector->disk)
        return 0;
    return sector->at == at && sector->disk == disk ? (int64_t)sector->number : -1;
}

static size_t tell(char *text, const struct words *sectors, const struct request *r)
{
    size_t length = 0;
    for (uint32_t i = 0, same; i < r->count; i += same) {
        int64_t number = number_of(sectors + i * TIMES, r->first + i);
        for (same = 1; i + same < r->count; same++)
            if (number_of(sectors + (i + same) * TIMES, r->first + i + same) != number)
                break;
        length += (size_t)sprintf(text + length, " %" PRId64 "*%" PRIu32, number, same);
    }
    return length;
}

/* The errno of what it did, or 0. */
static int transfer(const struct request *r, void *data, size_t length)
{
    off_t start = (off_t)r->first * SECTOR;
    ssize_t done = r->kind == 'r' ? pread(device, data, length, start)
                                  : pwrite(device, data, length, start);
    if (done < 0)
        return errno;
    return (size_t)done == length ? 0 : EIO;
}

static int execute(const struct request *r, struct words *sectors)
{
    size_t length = (size_t)r->count * SECTOR;
    uint64_t range[2] = {(uint64_t)r->first * SECTOR, length};
    switch (r->kind) {
    case 'w':
        fill(sectors, r);
        return transfer(r, sectors, length);
    case 'r':
        return transfer(r, sectors, length);
    case 'f':
        return fsync(device) ? errno : 0;
    case 'd':
        return ioctl(device, BLKDISCARD, range) ? errno : 0;
    default: /* zeroes, which Linux may unmap or not as it likes */
        return ioctl(device, BLKZEROOUT, range) ? errno : 0;
    }
}

static void *work(void *unused)
{
    static const size_t TEXT = 64 + LARGEST * 32;
    void *sectors;
    char *text = malloc(TEXT);
    if (!text || posix_memalign(&sectors, 4096, LARGEST * SECTOR))
        die("memory");
    for (;;) {
        pthread_mutex_lock(&lock);
        while (head == tail)
            pthread_cond_wait(&more, &lock);
        struct request r = queue[tail++ % QUEUE];
        pthread_mutex_unlock(&lock);
        int failed = execute(&r, sectors);
        size_t length = (size_t)sprintf(text, "%lu %d", r.id, failed);
        if (r.kind == 'r' && !failed)
            length += tell(text + length, sectors, &r);
        text[length++] = '\n';
        say(text, length);
    }
    return unused;
}

static void take(const char *line)
{
    struct request r;
    if (sscanf(line, "%lu %c %" SCNu32 " %" SCNu32 " %" SCNu64, &r.id, &r.kind, &r.first,
               &r.count, &r.number) != 5 || r.count > LARGEST) {
        fprintf(stderr, "what is %s", line);
        exit(1);
    }
    pthread_mutex_lock(&lock);
    if (head - tail == QUEUE)
        exit(1);
    queue[head++ % QUEUE] = r;
    pthread_cond_signal(&more);
    pthread_mutex_unlock(&lock);
}

int main(int argc, char **argv)
{
    struct termios raw;
    char line[256];
    pthread_t thread;
    if (argc != 5)
        return 2;
    device = open(argv[1], O_RDWR | O_DIRECT | O_EXCL | O_CLOEXEC);
    tty = open(argv[2], O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (device < 0 || tty < 0 || tcgetattr(tty, &raw))
        die("open");
    cfmakeraw(&raw);
    if (tcsetattr(tty, TCSANOW, &raw))
        die("tty");
    disk = (uint32_t)strtoul(argv[3], NULL, 10);
    for (int i = 0; i < WORKERS; i++)
        if (pthread_create(&thread, NULL, work, NULL))
            die("thread");
    FILE *input = fdopen(dup(tty), "r");
    if (!input)
        die("fdopen");
    say(line, (size_t)snprintf(line, sizeof line, "ready %d\n", atoi(argv[4]) != 0));
    while (fgets(line, sizeof line, input))
        take(line);
    return 1;
}
