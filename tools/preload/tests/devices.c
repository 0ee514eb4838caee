/* Checks what a program may expect of /dev/xen/evtchn and /dev/xen/gntdev, with system calls only:
 *     devices DOMID PORT GREF GREF
 * The domain has allocated PORT for dom0, answers each notification with one, and grants two pages:
 * the first is read-only and holds "from the guest", the second may be written. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(so)                                                                            \
    do {                                                                                     \
        if (!(so)) {                                                                         \
            fprintf(stderr, "line %d: %s (errno: %s)\n", __LINE__, #so, strerror(errno));    \
            exit(1);                                                                         \
        }                                                                                    \
    } while (0)
#define FAILS(call, number) CHECK((errno = 0, (call) == -1) && errno == (number))

struct bind { uint32_t domid, port; };
struct ref { uint32_t domid, ref; };
struct map { uint32_t count, pad; uint64_t index; struct ref refs[2]; };
struct unmap { uint64_t index; uint32_t count, pad; };
struct offset { uint64_t vaddr, offset; uint32_t count, pad; };
struct foreign { uint32_t ref; uint16_t offset, domid; };
union side { void *local; struct foreign foreign; };
struct segment { union side source, dest; uint16_t len, flags; int16_t status; };
struct copy { uint32_t count; struct segment *segments; };

#define EVTCHN(number, type) _IOC(_IOC_NONE, 'E', number, sizeof(type))
#define BIND_VIRQ EVTCHN(0, uint32_t)
#define BIND_INTERDOMAIN EVTCHN(1, struct bind)
#define BIND_UNBOUND EVTCHN(2, uint32_t)
#define UNBIND EVTCHN(3, uint32_t)
#define NOTIFY EVTCHN(4, uint32_t)
#define RESET _IOC(_IOC_NONE, 'E', 5, 0)
#define RESTRICT EVTCHN(6, uint16_t)

#define GNTDEV(number, size) _IOC(_IOC_NONE, 'G', number, size)
#define MAP_GRANT_REF GNTDEV(0, 24)
#define UNMAP_GRANT_REF GNTDEV(1, sizeof(struct unmap))
#define GET_OFFSET GNTDEV(2, sizeof(struct offset))
#define SET_MAX_GRANTS GNTDEV(3, sizeof(uint32_t))
#define GRANT_COPY GNTDEV(8, sizeof(struct copy))

static int readable(int fd)
{
    struct pollfd polled = { .fd = fd, .events = POLLIN };
    return poll(&polled, 1, 0) == 1;
}

static void event_channels(uint32_t domid, uint32_t remote_port)
{
    int fd = open("/dev/xen/evtchn", O_RDWR | O_CLOEXEC);
    CHECK(fd >= 0);
    CHECK(!readable(fd));
    uint32_t virq = 0;
    CHECK(ioctl(fd, BIND_VIRQ, &virq) == -1);
    struct bind bind = { domid, remote_port + 1000 };
    FAILS(ioctl(fd, BIND_INTERDOMAIN, &bind), EINVAL);
    bind.port = remote_port;
    int bound = ioctl(fd, BIND_INTERDOMAIN, &bind);
    CHECK(bound > 0);

    /* A bound port is pending once, and then masked until it is written. */
    uint32_t port = bound, seen[4] = { 0 };
    CHECK(readable(fd));
    CHECK(read(fd, seen, sizeof seen) == sizeof seen[0] && seen[0] == port);
    CHECK(!readable(fd));
    CHECK(ioctl(fd, NOTIFY, &port) == 0);
    CHECK(write(fd, &port, sizeof port) == sizeof port);

    /* A read waits for the answer. */
    CHECK(fcntl(fd, F_GETFL) == O_RDWR);
    CHECK(read(fd, seen, sizeof seen) == sizeof seen[0] && seen[0] == port);
    CHECK(write(fd, &port, sizeof port) == sizeof port);

    CHECK(fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
    CHECK(fcntl(fd, F_GETFL) & O_NONBLOCK);
    FAILS(read(fd, seen, sizeof seen), EAGAIN);
    CHECK(read(fd, seen, 3) == 0);
    CHECK(ioctl(fd, NOTIFY, &port) == 0);
    struct pollfd polled = { .fd = fd, .events = POLLIN };
    CHECK(poll(&polled, 1, -1) == 1);
    CHECK(ioctl(fd, RESET) == 0);
    FAILS(read(fd, seen, sizeof seen), EAGAIN);

    uint32_t nobodys = port + 1;
    FAILS(ioctl(fd, NOTIFY, &nobodys), ENOTCONN);
    FAILS(ioctl(fd, UNBIND, &nobodys), ENOTCONN);
    CHECK(ioctl(fd, UNBIND, &port) == 0);
    FAILS(ioctl(fd, NOTIFY, &port), ENOTCONN);

    uint16_t only = 77;
    uint32_t remote = domid;
    CHECK(ioctl(fd, BIND_UNBOUND, &remote) > 0);
    CHECK(ioctl(fd, RESTRICT, &only) == 0);
    FAILS(ioctl(fd, BIND_UNBOUND, &remote), EACCES);
    FAILS(ioctl(fd, _IOC(_IOC_NONE, 'E', 99, 0), NULL), ENOTTY);
    CHECK(close(fd) == 0);
    FAILS(ioctl(fd, NOTIFY, &port), EBADF);
}

static void maps(uint32_t domid, uint32_t first, uint32_t second)
{
    long page = sysconf(_SC_PAGESIZE);
    int fd = open("/dev/xen/gntdev", O_RDWR | O_CLOEXEC);
    CHECK(fd >= 0);
    uint32_t most = 1024;
    CHECK(ioctl(fd, SET_MAX_GRANTS, &most) == 0);
    struct map map = { .count = 2, .refs = { { domid, first }, { domid, second } } };
    CHECK(ioctl(fd, MAP_GRANT_REF, &map) == 0);
    /* The first page may only be read. */
    CHECK(mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, map.index) == MAP_FAILED);
    CHECK(errno == EINVAL);
    CHECK(mmap(NULL, page, PROT_READ, MAP_SHARED, fd, map.index) == MAP_FAILED);
    CHECK(mmap(NULL, 2 * page, PROT_READ, MAP_SHARED, fd, map.index + page) == MAP_FAILED);
    char *pages = mmap(NULL, 2 * page, PROT_READ, MAP_SHARED, fd, map.index);
    CHECK(pages != MAP_FAILED);
    CHECK(mmap(NULL, 2 * page, PROT_READ, MAP_SHARED, fd, map.index) == MAP_FAILED);
    CHECK(memcmp(pages, "from the guest", 14) == 0);

    struct offset offset = { .vaddr = (uintptr_t)pages };
    CHECK(ioctl(fd, GET_OFFSET, &offset) == 0);
    CHECK(offset.offset == map.index && offset.count == 2);
    offset.vaddr = (uintptr_t)&offset;
    FAILS(ioctl(fd, GET_OFFSET, &offset), EINVAL);

    /* Giving back works in both orders, and a mapping outlives its device. */
    CHECK(munmap(pages, 2 * page) == 0);
    struct unmap unmap = { .index = map.index, .count = 2 };
    CHECK(ioctl(fd, UNMAP_GRANT_REF, &unmap) == 0);
    FAILS(ioctl(fd, UNMAP_GRANT_REF, &unmap), ENOENT);
    CHECK(mmap(NULL, 2 * page, PROT_READ, MAP_SHARED, fd, map.index) == MAP_FAILED);
    map.count = 1;
    map.refs[0].ref = second;
    CHECK(ioctl(fd, MAP_GRANT_REF, &map) == 0);
    pages = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, map.index);
    CHECK(pages != MAP_FAILED);
    unmap.index = map.index;
    unmap.count = 1;
    CHECK(ioctl(fd, UNMAP_GRANT_REF, &unmap) == 0);
    CHECK(close(fd) == 0);
    memcpy(pages, "mapped", 6);

    /* A child has neither device nor pages, and closing them does not affect the parent. */
    fd = open("/dev/xen/gntdev", O_RDWR);
    map.refs[0].ref = first;
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        munmap(pages, page);
        _exit(ioctl(fd, MAP_GRANT_REF, &map) == 0 || close(fd) != 0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(ioctl(fd, MAP_GRANT_REF, &map) == 0);
    CHECK(close(fd) == 0);
    CHECK(memcmp(pages, "mapped", 6) == 0);
    CHECK(munmap(pages, page) == 0);
}

static void copies(uint16_t domid, uint32_t first, uint32_t second)
{
    int fd = open("/dev/xen/gntdev", O_RDWR);
    CHECK(fd >= 0);
    struct copy copy = { 0, NULL };
    CHECK(ioctl(fd, GRANT_COPY, &copy) == 0);
    char fetched[9] = "", sent[] = "to the guest";
    struct segment segments[40];
    for (int i = 0; i < 40; i++)
        segments[i] = (struct segment){
            .source.foreign = { first, 5, domid }, .dest.local = fetched, .len = 9, .flags = 1,
        };
    segments[38] = (struct segment){
        .source.local = sent, .dest.foreign = { second, 100, domid }, .len = 12, .flags = 2,
    };
    segments[39].source.foreign.domid = domid + 1;
    segments[20] = segments[38];
    segments[20].dest.foreign.ref = first;
    copy = (struct copy){ 40, segments };
    CHECK(ioctl(fd, GRANT_COPY, &copy) == 0);
    for (int i = 0; i < 39; i++)
        CHECK(segments[i].status == (i == 20 ? -1 : 0));
    CHECK(segments[39].status == -2);
    CHECK(memcmp(fetched, "the guest", 9) == 0);
    segments[0].source.foreign.offset = 4090;
    FAILS(ioctl(fd, GRANT_COPY, &copy), EINVAL);
    segments[0].flags = 0;
    FAILS(ioctl(fd, GRANT_COPY, &copy), EINVAL);
    CHECK(close(fd) == 0);
}

int main(int count, char **arguments)
{
    CHECK(count == 5);
    uint32_t numbers[4];
    for (int i = 0; i < 4; i++)
        numbers[i] = strtoul(arguments[i + 1], NULL, 10);
    event_channels(numbers[0], numbers[1]);
    maps(numbers[0], numbers[2], numbers[3]);
    copies(numbers[0], numbers[2], numbers[3]);
    return 0;
}
