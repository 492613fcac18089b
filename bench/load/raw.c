/* The raw limits that loads are measured against, without anything of ours in them.
 *
 *   raw MODE DEPTH BLOCK_BYTES FILE...
 *
 *   uring     one thread, io_uring by raw system calls, O_DIRECT, DEPTH reads of BLOCK_BYTES in flight, files in one queue
 *   threads   DEPTH threads with preads past the page cache, each over its own run of blocks: the loop of ServerlessLLM's store
 *             (sllm_store/csrc/sllm_store/model.cpp, Model::ToHost), whose defaults are 4 threads and 32 MB, into 4 KiB pages
 *   buffered  DEPTH threads with ordinary preads, the next block each: what the page cache gives
 *   write     DEPTH threads write the size of the first FILE, which is replaced, past the page cache, and sync it; with a second
 *             FILE each block is read from it before it is written, past the page cache too: a copy
 *
 * Memory is touched before anything is timed: a memfd of huge pages where the machine has them. It prints "ready", waits for a
 * line on standard input, works, and prints one line of JSON. "check" is the sum of all 8-byte words, taken after the time.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ull
#define HUGE (2ull << 20)

struct block {
    int file;
    uint64_t offset, length, at; /* length is what the file holds; a direct read asks for whole pages */
};

static int *descriptors;
static struct block *blocks;
static uint64_t block_count, written_bytes, total, arena_bytes;
static char *arena;
static const char *pages = "small";
static atomic_ullong next_block;
static int thread_count;
static int direct;

static void die(const char *what) {
    fprintf(stderr, "raw: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

static double cpu(void) {
    struct rusage use;
    getrusage(RUSAGE_SELF, &use);
    return use.ru_utime.tv_sec + use.ru_stime.tv_sec + (use.ru_utime.tv_usec + use.ru_stime.tv_usec) * 1e-6;
}

static uint64_t whole_pages(uint64_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

static void open_files(char **paths, int count, uint64_t block_bytes) {
    descriptors = calloc(count, sizeof *descriptors);
    uint64_t at = 0;
    for (int file = 0; file < count; file++) {
        struct stat status;
        descriptors[file] = open(paths[file], O_RDONLY | (direct ? O_DIRECT : 0));
        if (descriptors[file] < 0 || fstat(descriptors[file], &status)) die(paths[file]);
        for (uint64_t offset = 0; offset < (uint64_t)status.st_size; offset += block_bytes) {
            uint64_t left = status.st_size - offset;
            if (block_count % 1024 == 0) blocks = realloc(blocks, (block_count + 1024) * sizeof *blocks);
            blocks[block_count++] = (struct block){file, offset, left < block_bytes ? left : block_bytes, at + offset};
        }
        total += status.st_size;
        at += whole_pages(status.st_size);
    }
    arena_bytes = (at + HUGE - 1) / HUGE * HUGE;
}

static void make_arena(int small_pages) {
    if (small_pages) {
        arena = aligned_alloc(PAGE, arena_bytes);
        if (!arena) die("aligned_alloc");
        memset(arena, 1, arena_bytes);
        return;
    }
    int memory = memfd_create("raw", MFD_HUGETLB);
    pages = "hugetlb";
    if (memory < 0 || ftruncate(memory, arena_bytes) ||
        (arena = mmap(NULL, arena_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0)) == MAP_FAILED) {
        pages = "small";
        memory = memfd_create("raw", 0);
        if (memory < 0 || ftruncate(memory, arena_bytes)) die("memfd_create");
        arena = mmap(NULL, arena_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
        if (arena == MAP_FAILED) die("mmap");
        madvise(arena, arena_bytes, MADV_HUGEPAGE);
    }
    for (uint64_t at = 0; at < arena_bytes; at += PAGE) arena[at] = 1;
}

static void read_fully(int file, char *to, uint64_t length, uint64_t offset) {
    while (length) {
        ssize_t count = pread(file, to, direct ? whole_pages(length) : length, offset);
        if (count <= 0) die("pread");
        if ((uint64_t)count > length) count = length;
        to += count, offset += count, length -= count;
    }
}

static void *take_next(void *ignored) {
    for (;;) {
        uint64_t index = atomic_fetch_add(&next_block, 1);
        if (index >= block_count) return ignored;
        struct block *block = &blocks[index];
        read_fully(descriptors[block->file], arena + block->at, block->length, block->offset);
    }
}

static void *take_own(void *number) {
    uint64_t each = (block_count + thread_count - 1) / thread_count, first = each * (uintptr_t)number;
    for (uint64_t index = first; index < first + each && index < block_count; index++) {
        struct block *block = &blocks[index];
        read_fully(descriptors[block->file], arena + block->at, block->length, block->offset);
    }
    return NULL;
}

static void *write_next(void *number) {
    char *memory = arena + (uintptr_t)number * written_bytes;
    for (;;) {
        uint64_t index = atomic_fetch_add(&next_block, 1);
        if (index >= block_count) return NULL;
        uint64_t at = index * written_bytes;
        if (descriptors[1] >= 0) read_fully(descriptors[1], memory, written_bytes, at);
        for (uint64_t done = 0; done < written_bytes;) {
            ssize_t count = pwrite(descriptors[0], memory + done, written_bytes - done, at + done);
            if (count <= 0) die("pwrite");
            done += count;
        }
    }
}

static void run_threads(void *(*work)(void *)) {
    pthread_t threads[256];
    for (uintptr_t number = 0; number < (uintptr_t)thread_count; number++)
        if (pthread_create(&threads[number], NULL, work, (void *)number)) die("pthread_create");
    for (int number = 0; number < thread_count; number++) pthread_join(threads[number], NULL);
}

static void run_uring(unsigned depth) {
    struct io_uring_params params = {0};
    int ring = syscall(__NR_io_uring_setup, depth, &params);
    if (ring < 0) die("io_uring_setup");
    size_t sq_bytes = params.sq_off.array + params.sq_entries * sizeof(uint32_t);
    size_t cq_bytes = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    char *sq = mmap(NULL, sq_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_SQ_RING);
    char *cq = mmap(NULL, cq_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_CQ_RING);
    struct io_uring_sqe *sqes = mmap(NULL, params.sq_entries * sizeof *sqes, PROT_READ | PROT_WRITE,
                                     MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_SQES);
    if (sq == MAP_FAILED || cq == MAP_FAILED || (void *)sqes == MAP_FAILED) die("mapping the ring");
    _Atomic uint32_t *sq_tail = (void *)(sq + params.sq_off.tail);
    uint32_t sq_mask = *(uint32_t *)(sq + params.sq_off.ring_mask), *sq_array = (void *)(sq + params.sq_off.array);
    _Atomic uint32_t *cq_head = (void *)(cq + params.cq_off.head), *cq_tail = (void *)(cq + params.cq_off.tail);
    uint32_t cq_mask = *(uint32_t *)(cq + params.cq_off.ring_mask);
    struct io_uring_cqe *cqes = (void *)(cq + params.cq_off.cqes);

    uint64_t begun = 0, ended = 0;
    unsigned unsubmitted = 0;
    while (ended < block_count) {
        while (begun < block_count && begun - ended < depth) {
            struct block *block = &blocks[begun];
            uint32_t tail = atomic_load_explicit(sq_tail, memory_order_relaxed), slot = tail & sq_mask;
            sqes[slot] = (struct io_uring_sqe){
                .opcode = IORING_OP_READ, .fd = descriptors[block->file], .off = block->offset, .user_data = begun,
                .addr = (uint64_t)(uintptr_t)(arena + block->at), .len = whole_pages(block->length)};
            sq_array[slot] = slot;
            atomic_store_explicit(sq_tail, tail + 1, memory_order_release);
            begun++, unsubmitted++;
        }
        int taken = syscall(__NR_io_uring_enter, ring, unsubmitted, 1, IORING_ENTER_GETEVENTS, NULL, 0);
        if (taken < 0 && errno == EINTR) continue;
        if (taken < 0) die("io_uring_enter");
        unsubmitted -= taken;
        uint32_t head = atomic_load_explicit(cq_head, memory_order_relaxed);
        while (head != atomic_load_explicit(cq_tail, memory_order_acquire)) {
            struct io_uring_cqe *cqe = &cqes[head++ & cq_mask];
            struct block *block = &blocks[cqe->user_data];
            if (cqe->res < 0) errno = -cqe->res, die("a read of the ring");
            if ((uint64_t)cqe->res < block->length) /* rare; the rest must begin at a whole page */
                read_fully(descriptors[block->file], arena + block->at, block->length, block->offset);
            ended++;
        }
        atomic_store_explicit(cq_head, head, memory_order_release);
    }
}

static void await_go(void) {
    char line[16];
    printf("ready\n");
    fflush(stdout);
    if (!fgets(line, sizeof line, stdin)) exit(1);
}

int main(int argc, char **argv) {
    if (argc < 5) return 2;
    const char *mode = argv[1];
    unsigned depth = atoi(argv[2]);
    uint64_t block_bytes = strtoull(argv[3], NULL, 10);
    thread_count = depth > 256 ? 256 : depth;
    direct = strcmp(mode, "buffered") != 0;
    if (!strcmp(mode, "write")) {
        struct stat status;
        if (stat(argv[4], &status)) die(argv[4]);
        written_bytes = block_bytes;
        block_count = status.st_size / block_bytes;
        total = block_count * block_bytes;
        arena_bytes = (thread_count * block_bytes + HUGE - 1) / HUGE * HUGE;
        make_arena(0);
        int noise = open("/dev/urandom", O_RDONLY);
        for (uint64_t done = 0; done < arena_bytes;) {
            ssize_t count = read(noise, arena + done, arena_bytes - done);
            if (count <= 0) die("urandom");
            done += count;
        }
        int file = open(argv[4], O_WRONLY | O_TRUNC | O_DIRECT), source = -1;
        if (file < 0) die(argv[4]);
        if (argc > 5 && (source = open(argv[5], O_RDONLY | O_DIRECT)) < 0) die(argv[5]);
        descriptors = (int[]){file, source};
        await_go();
        double began = now(), cpu_began = cpu();
        if (posix_fallocate(file, 0, total)) die("posix_fallocate");
        run_threads(write_next);
        if (fsync(file)) die("fsync");
        printf("{\"seconds\": %.6f, \"cpu_s\": %.6f, \"bytes\": %llu}\n", now() - began, cpu() - cpu_began,
               (unsigned long long)total);
        return 0;
    }
    open_files(argv + 4, argc - 4, block_bytes);
    make_arena(!strcmp(mode, "threads"));
    await_go();
    double began = now(), cpu_began = cpu();
    if (!strcmp(mode, "uring")) run_uring(depth);
    else if (!strcmp(mode, "threads")) run_threads(take_own);
    else if (!strcmp(mode, "buffered")) run_threads(take_next);
    else return 2;
    double seconds = now() - began, cpu_s = cpu() - cpu_began;
    uint64_t check = 0;
    for (uint64_t index = 0; index < block_count; index++) {
        uint64_t words = blocks[index].length / 8;
        for (uint64_t word = 0; word < words; word++) check += ((uint64_t *)(arena + blocks[index].at))[word];
    }
    printf("{\"seconds\": %.6f, \"cpu_s\": %.6f, \"bytes\": %llu, \"pages\": \"%s\", \"check\": %llu}\n", seconds, cpu_s,
           (unsigned long long)total, pages, (unsigned long long)check);
    return 0;
}
