// Plays NCCL to the plugin, by NCCL's own headers: `caller PLUGIN VERSION STEP...`, compiled once per version with
// -DVERSION=N. It prints what it did, one line a step, and waits for a line of input between steps where told to.

#define _GNU_SOURCE
#include <assert.h>
#include <dlfcn.h>
#include <malloc.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "err.h"
typedef pid_t ncclPid_t;
#include "profiler.h"

#define JOIN_(a, b, c) a##b##c
#define JOIN(a, b, c) JOIN_(a, b, c)
#define TABLE JOIN(ncclProfiler_v, VERSION, _t)
#define DESCRIPTOR JOIN(ncclProfilerEventDescr_v, VERSION, _t)
#define ARGUMENTS JOIN(ncclProfilerEventStateArgs_v, VERSION, _t)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

#define HASH 0x1122334455667788ull
#define THREADS 8

static TABLE *plugin;
// As NCCL's: one int for all communicators.
static int mask;

static uint64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static void *join(uint64_t hash, int nodes, int ranks, int rank) {
  void *context = NULL;
  ncclResult_t result;
#if VERSION <= 3
  (void)hash, (void)nodes, (void)ranks, (void)rank;
  result = plugin->init(&context, &mask);
#elif VERSION == 4
  result = plugin->init(&context, &mask, "name", hash, nodes, ranks, rank, NULL);
#else
  result = plugin->init(&context, hash, &mask, "name", nodes, ranks, rank, NULL);
#endif
  if (result != ncclSuccess || context == NULL) {
    printf("init failed: %d\n", result);
    exit(1);
  }
  return context;
}

static int read_mask(void) { return atomic_load_explicit((_Atomic int *)&mask, memory_order_relaxed); }

static void *start(void *context, DESCRIPTOR *descriptor) {
  void *handle = (void *)0x5a5a5a5a;
  plugin->startEvent(context, &handle, descriptor);
  return handle;
}

static DESCRIPTOR described(uint64_t type, void *parent, int rank) {
  DESCRIPTOR d;
  memset(&d, 0xff, sizeof d); // what the plugin must not look at
  d.type = type;
  d.parentObj = parent;
  d.rank = rank;
  return d;
}

static void *group(void *context) {
  DESCRIPTOR d = described(ncclProfileGroup, NULL, 0);
  return start(context, &d);
}

static void *collective(void *context, void *parent, uint64_t seq) {
  DESCRIPTOR d = described(ncclProfileColl, parent, 3);
#if VERSION <= 3
  d.coll.name = "name";
  d.coll.commHash = HASH;
#endif
  d.coll.seqNumber = seq;
  d.coll.func = "ReduceScatter";
  d.coll.count = 123456789;
  d.coll.datatype = "ncclFloat32";
  return start(context, &d);
}

static void *send_recv(void *context, void *parent, int peer) {
  DESCRIPTOR d = described(ncclProfileP2p, parent, 3);
#if VERSION <= 3
  d.p2p.name = "name";
  d.p2p.commHash = HASH;
#endif
  d.p2p.func = "Send";
  d.p2p.count = 4321;
  d.p2p.peer = peer;
  return start(context, &d);
}

static void *operation(void *context, void *parent, pid_t pid, int channel, int peer, bool send) {
  DESCRIPTOR d = described(ncclProfileProxyOp, parent, 3);
  d.proxyOp.pid = pid;
  d.proxyOp.channelId = (uint8_t)channel;
  d.proxyOp.peer = peer;
  d.proxyOp.nSteps = 17;
  d.proxyOp.chunkSize = 524288;
  d.proxyOp.isSend = send;
  return start(context, &d);
}

static void *step(void *context, void *parent, int number) {
  DESCRIPTOR d = described(ncclProfileProxyStep, parent, 3);
  d.proxyStep.step = number;
  return start(context, &d);
}

static void state(void *handle, int to, size_t bytes) {
  ARGUMENTS arguments;
  memset(&arguments, 0, sizeof arguments);
#if VERSION >= 4
  arguments.proxyStep.transSize = bytes;
#else
  (void)bytes;
#endif
  plugin->recordEventState(handle, to, &arguments);
}

static void sleep_us(long us) {
  struct timespec t = {0, us * 1000};
  nanosleep(&t, NULL);
}

// One of everything, nested as NCCL does, with the times at which it was done.
static void one_of_each(void *context) {
  void *parent = group(context);
  void *coll = collective(context, parent, 41);
  void *p2p = send_recv(context, parent, 6);
  void *op = operation(context, coll, getpid(), 5, 7, true);
  uint64_t before = now();
  void *first = step(context, op, 11);
  state(first, ncclProfilerProxyStepSendGPUWait, 0);
  sleep_us(3000);
#if VERSION >= 4
  // Once per look, as NCCL.
  for (int i = 0; i < 3; i++) {
    state(first, ncclProfilerProxyStepSendPeerWait_v4, 0);
    sleep_us(1000);
  }
#endif
  state(first, ncclProfilerProxyStepSendWait, 65536);
  sleep_us(2000);
  plugin->stopEvent(first);
  uint64_t after = now();
  void *back = operation(context, coll, getpid() + 1, 9, 2, false);
  void *second = step(context, back, 12);
  state(second, ncclProfilerProxyStepRecvWait, 0);
  state(second, ncclProfilerProxyStepRecvFlushWait, 4096);
  state(second, ncclProfilerProxyStepRecvGPUWait, 4096);
  plugin->stopEvent(second);
  plugin->stopEvent(back);
  plugin->stopEvent(op);
#if VERSION >= 3
  struct {
    ncclProfilerNetIbDescr_v1_t data;
  } ib;
  memset(&ib, 0xff, sizeof ib);
  ib.data.type = ncclProfileQp;
  ib.data.qp.device = 2;
  ib.data.qp.wr_id = 0xabcdef0123456789ull;
  ib.data.qp.opcode = 4;
  ib.data.qp.qpNum = 1234;
  ib.data.qp.length = 99999;
  DESCRIPTOR net = described(ncclProfileNetPlugin, NULL, 3);
  net.netPlugin.id = NCCL_PROFILER_NET_TYPE_IB | 1;
  net.netPlugin.data = &ib.data;
  plugin->stopEvent(start(context, &net));
  DESCRIPTOR kernel = described(ncclProfileKernelCh, coll, 0);
  kernel.kernelCh.channelId = 8;
#if VERSION >= 4
  kernel.kernelCh.pTimer = 777000;
#endif
  void *channel = start(context, &kernel);
#if VERSION >= 4
  ARGUMENTS stop;
  stop.kernelCh.pTimer = 888000;
  plugin->recordEventState(channel, ncclProfilerKernelChStop, &stop);
#endif
  plugin->stopEvent(channel);
#endif
#if VERSION >= 5
  DESCRIPTOR api = described(ncclProfileCollApi, NULL, 0);
  api.collApi.func = "AllGather";
  api.collApi.count = 55;
  void *called = start(context, &api);
  plugin->recordEventState(called, ncclProfilerGroupStartApiStop, NULL);
  plugin->stopEvent(called);
#endif
#if VERSION >= 6
  DESCRIPTOR copy = described(ncclProfileCeColl, NULL, 3);
  copy.ceColl.seqNumber = 66;
  copy.ceColl.func = "AlltoAll";
  copy.ceColl.count = 77;
  plugin->stopEvent(start(context, &copy));
  DESCRIPTOR batch = described(ncclProfileCeBatch, NULL, 3);
  batch.ceCollBatch.numOps = 3;
  batch.ceCollBatch.totalBytes = 1ull << 33;
  plugin->stopEvent(start(context, &batch));
#endif
  plugin->stopEvent(p2p);
  plugin->stopEvent(coll);
  plugin->stopEvent(parent);
  printf("each %llu %llu %llu %llu\n", (unsigned long long)before, (unsigned long long)after,
         (unsigned long long)(uintptr_t)coll, (unsigned long long)(uintptr_t)op);
}

static void *unended;

// What NCCL is known to do wrong, and worse.
static void wrong(void *context) {
  void *op = operation(context, NULL, getpid(), 1, 2, true);
  void *twice = step(context, op, 1);
  plugin->stopEvent(twice);
  plugin->stopEvent(twice);
  state(twice, ncclProfilerProxyStepSendWait, 1);
  void *strange = step(context, op, 2);
  state(strange, 99, 0);
  state(strange, -1, 0);
  plugin->stopEvent(strange);
  plugin->stopEvent((void *)(uintptr_t)0x7fffdeadbeefull);
  plugin->stopEvent((void *)-1);
  plugin->stopEvent(NULL);
  state(NULL, 8, 0);
  plugin->recordEventState(op, ncclProfilerProxyOpInProgress_v4, NULL);
  void *orphan = step(context, (void *)0xdeadbeef, 3);
  plugin->stopEvent(op);
  plugin->stopEvent(orphan);
  DESCRIPTOR none = described(0, NULL, 0), several = described(3, NULL, 0);
  if (start(context, &none) != NULL || start(context, &several) != NULL) printf("a kind that is none began\n");
  void *handle = (void *)1;
  plugin->startEvent(context, &handle, NULL);
  if (handle != NULL) printf("nothing began\n");
  plugin->startEvent((void *)-1, &handle, &none);
  // Its place holds another event by now.
  int met = 0;
  for (int i = 0; i < 5000; i++) {
    void *other = step(context, NULL, 5);
    if (((uintptr_t)other & 0xffff) == ((uintptr_t)twice & 0xffff) && met++ == 0) {
      plugin->stopEvent(twice);
      state(other, ncclProfilerProxyStepSendWait, 1);
    }
    plugin->stopEvent(other);
  }
  if (met == 0) printf("no place was used again\n");
  unended = step(context, NULL, 4);
  printf("wrong\n");
}

// A step that waits for data until the caller ends.
static void hold(void *context) {
  void *op = operation(context, NULL, getpid(), 1, 2, false);
  void *waits = step(context, op, 5);
  state(waits, ncclProfilerProxyStepRecvWait, 0);
  printf("hold\n");
}

static _Atomic int rounds;

static void *hammer(void *context) {
  int all = atomic_load(&rounds);
  for (int i = 0; i < all; i++) {
    void *op = operation(context, NULL, getpid(), 1, 2, i % 2);
    void *of[8];
    for (int s = 0; s < 8; s++) {
      of[s] = step(context, op, i * 8 + s);
      state(of[s], i % 2 ? ncclProfilerProxyStepSendGPUWait : ncclProfilerProxyStepRecvWait, 0);
    }
    for (int s = 0; s < 8; s++) {
      state(of[s], i % 2 ? ncclProfilerProxyStepSendWait : ncclProfilerProxyStepRecvFlushWait, 1);
      plugin->stopEvent(of[s]);
    }
    plugin->stopEvent(op);
    if (i % 64 == 0) sleep_us(200);
  }
  return NULL;
}

static void hammered(void *context, int all) {
  atomic_store(&rounds, all);
  pthread_t threads[THREADS];
  for (int i = 0; i < THREADS; i++) pthread_create(&threads[i], NULL, hammer, context);
  for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
  printf("hammer %d\n", THREADS * all);
}

// One thread alone: nothing else could allocate.
static void allocated(void *context) {
  atomic_store(&rounds, 512);
  hammer(context);
  struct mallinfo2 before = mallinfo2();
  hammer(context);
  struct mallinfo2 after = mallinfo2();
  printf("allocate %lld %lld\n", (long long)(after.uordblks - before.uordblks), (long long)(after.hblks - before.hblks));
}

static void forked(void *context) {
  fflush(stdout);
  pid_t child = fork();
  if (child == 0) {
    void *op = operation(context, NULL, getpid(), 1, 2, true);
    plugin->stopEvent(unended);
    plugin->finalize(context);
    _exit(op == NULL ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  printf("fork %d\n", status);
}

static void communicators(void) {
  void *of[1100];
  for (int i = 0; i < 1100; i++) of[i] = join(HASH + (uint64_t)i, 2, 8, i % 8);
  // In any order, and twice.
  for (int i = 0; i < 1100; i += 2) plugin->finalize(of[i]);
  for (int i = 1099; i > 0; i -= 2) plugin->finalize(of[i]);
  plugin->finalize(of[0]);
  plugin->finalize(NULL);
  plugin->finalize((void *)-1);
  printf("communicators\n");
}

static double ns_per_call(void *context, int calls) {
  atomic_store(&rounds, 0);
  uint64_t before = now();
  for (int i = 0; i < calls / 5; i++) {
    void *one = step(context, NULL, i);
    state(one, ncclProfilerProxyStepSendGPUWait, 0);
    state(one, ncclProfilerProxyStepSendPeerWait_v4, 0);
    state(one, ncclProfilerProxyStepSendWait, 1);
    plugin->stopEvent(one);
  }
  return (double)(now() - before) / calls;
}

int main(int argc, char **argv) {
  assert(argc == 2);
  setvbuf(stdout, NULL, _IOLBF, 0);
  void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) {
    printf("%s\n", dlerror());
    return 1;
  }
  plugin = dlsym(library, "ncclProfiler_v" TEXT(VERSION));
  if (plugin == NULL) {
    printf("no table\n");
    return 1;
  }
  void *context = NULL;
  char line[64];
  printf("ready %s %d\n", plugin->name, (int)getpid());
  while (fgets(line, sizeof line, stdin) != NULL) {
    int number = 0;
    if (strncmp(line, "init", 4) == 0) {
      context = join(HASH, 2, 16, 3);
      printf("init %d\n", read_mask());
    } else if (sscanf(line, "mask %d", &number) == 1) {
      for (int i = 0; i < 600 && read_mask() != number; i++) sleep_us(10000);
      printf("mask %d\n", read_mask());
    } else if (strncmp(line, "each", 4) == 0) {
      one_of_each(context);
    } else if (strncmp(line, "hold", 4) == 0) {
      hold(context);
    } else if (strncmp(line, "wrong", 5) == 0) {
      wrong(context);
    } else if (sscanf(line, "hammer %d", &number) == 1) {
      hammered(context, number);
    } else if (strncmp(line, "allocate", 8) == 0) {
      allocated(context);
    } else if (strncmp(line, "fork", 4) == 0) {
      forked(context);
    } else if (strncmp(line, "communicators", 13) == 0) {
      communicators();
    } else if (strncmp(line, "finalize", 8) == 0) {
      plugin->finalize(context);
      printf("finalize %d\n", read_mask());
    } else if (strncmp(line, "close", 5) == 0) {
      // As NCCL after its last communicator; a later one loads it again.
      printf("close %d\n", dlclose(library));
      library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
      plugin = dlsym(library, "ncclProfiler_v" TEXT(VERSION));
    } else if (sscanf(line, "cost %d", &number) == 1) {
      printf("cost %f\n", ns_per_call(context, number));
    } else {
      printf("what?\n");
      return 1;
    }
  }
  return 0;
}
