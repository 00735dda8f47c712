/* A management library for tests: two GPUs of which the first has GPM and the second has not.
 *
 * BLOCK is a directory: while it holds a file `hang`, nvmlDeviceGetClockInfo of GPU 0 does not return; while it holds
 * a file `hang-init`, nvmlInit_v2 does not. A file `xid` becomes a fault of GPU 1; GPU 0 tells no faults. Struct layouts are nvml.h's. */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

typedef unsigned int u32;
typedef unsigned long long u64;

#define NOT_SUPPORTED 3
#define INSUFFICIENT_SIZE 7
#define BAD_ARGUMENT 2

static u64 energy, heat, old_heat, samples, link_errors;
static u32 replays;

static void block_on(const char *file) {
    while (access(file, F_OK) == 0) usleep(2000);
}

static int index_of(void *device) { return (int)((char *)device - (char *)0x1000); }

int nvmlInit_v2(void) { block_on(BLOCK "/hang-init"); return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { (void)code; return "stub"; }
int nvmlSystemGetDriverVersion(char *out, u32 length) { snprintf(out, length, "580.95.05"); return 0; }
int nvmlDeviceGetCount_v2(u32 *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(u32 index, void **device) { *device = (char *)0x1000 + index; return 0; }
int nvmlDeviceGetName(void *device, char *out, u32 length) { (void)device; snprintf(out, length, "Stub H100"); return 0; }
int nvmlDeviceGetUUID(void *device, char *out, u32 length) {
    snprintf(out, length, "GPU-0000000%d-aaaa", index_of(device));
    return 0;
}

typedef struct { char legacy[16]; u32 domain, bus, device, id, subsystem; char bus_id[32]; } Pci;
int nvmlDeviceGetPciInfo_v3(void *device, Pci *pci) {
    memset(pci, 0, sizeof *pci);
    pci->bus = 0x18 + index_of(device);
    pci->id = 0x233010de;
    return 0;
}

int nvmlDeviceGetMaxClockInfo(void *device, u32 kind, u32 *mhz) { (void)device; (void)kind; *mhz = 1980; return 0; }
int nvmlDeviceGetClockInfo(void *device, u32 kind, u32 *mhz) {
    (void)kind;
    if (index_of(device) == 0) block_on(BLOCK "/hang");
    *mhz = 1410;
    return 0;
}
int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, u64 *bits) { (void)device; *bits = 0x20; return 0; }
int nvmlDeviceGetTotalEnergyConsumption(void *device, u64 *mj) { (void)device; *mj = energy += 70; return 0; }
int nvmlDeviceGetTemperature(void *device, u32 sensor, u32 *celsius) {
    (void)sensor;
    if (index_of(device) == 1) return NOT_SUPPORTED;
    *celsius = 84;
    return 0;
}
typedef struct { u32 gpu, memory; } Rates;
int nvmlDeviceGetUtilizationRates(void *device, Rates *rates) { (void)device; rates->gpu = 42; return 0; }
typedef struct { u32 version; u64 total, reserved, free, used; } Memory;
int nvmlDeviceGetMemoryInfo_v2(void *device, Memory *memory) { (void)device; memory->used = 5; return 0; }

typedef struct { u32 field, scope; long long timestamp, latency; int type, result; u64 value; } Field;
int nvmlDeviceGetFieldValues(void *device, int count, Field *fields) {
    for (int i = 0; i < count; i++) {
        fields[i].type = 3;
        fields[i].result = 0;
        /* Slowdown by heat: GPU 0 by software and hardware apart, in the numbering from driver 580.82 on; GPU 1 as
         * older drivers count it. */
        if (fields[i].field == 269 && index_of(device) == 0) fields[i].value = heat += 1000000;
        else if (fields[i].field == 270 && index_of(device) == 0) fields[i].value = 0;
        else if (fields[i].field == 52 && index_of(device) == 0) fields[i].value = link_errors += 2;
        else if (fields[i].field == 75 && index_of(device) == 1) fields[i].value = old_heat += 7000;
        else fields[i].result = NOT_SUPPORTED;
    }
    return 0;
}

/* The links of GPU 0: eight lanes of sixteen, and one of four links to other GPUs down. */
static int link_of(void *device, u32 *out, u32 value) {
    if (index_of(device) == 1) return NOT_SUPPORTED;
    *out = value;
    return 0;
}
int nvmlDeviceGetCurrPcieLinkWidth(void *device, u32 *lanes) { return link_of(device, lanes, 8); }
int nvmlDeviceGetMaxPcieLinkWidth(void *device, u32 *lanes) { return link_of(device, lanes, 16); }
int nvmlDeviceGetCurrPcieLinkGeneration(void *device, u32 *generation) { return link_of(device, generation, 4); }
int nvmlDeviceGetMaxPcieLinkGeneration(void *device, u32 *generation) { return link_of(device, generation, 5); }
int nvmlDeviceGetPcieReplayCounter(void *device, u32 *count) { return link_of(device, count, replays += 3); }
int nvmlDeviceGetNvLinkState(void *device, u32 link, u32 *up) {
    return link < 4 ? link_of(device, up, link != 3) : BAD_ARGUMENT;
}

typedef struct { void *device; u64 kind, data; u32 gpu_instance, compute_instance; } Event;
int nvmlEventSetCreate(void **set) { *set = (void *)0x3000; return 0; }
int nvmlEventSetFree(void *set) { (void)set; return 0; }
int nvmlDeviceRegisterEvents(void *device, u64 kinds, void *set) {
    (void)set;
    return index_of(device) == 1 && kinds == 8 ? 0 : NOT_SUPPORTED;
}
int nvmlEventSetWait_v2(void *set, Event *event, u32 timeout_ms) {
    (void)set;
    for (u32 waited = 0; waited < timeout_ms; waited += 2) {
        if (unlink(BLOCK "/xid") == 0) {
            memset(event, 0, sizeof *event);
            event->device = (char *)0x1000 + 1;
            event->kind = 8;
            event->data = 79;
            return 0;
        }
        usleep(2000);
    }
    return 10;
}

typedef struct { u32 pid; u64 memory; u32 gpu_instance, compute_instance; } Process;
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, u32 *count, Process *out) {
    if (out == 0 || *count < 1) { *count = 1; return INSUFFICIENT_SIZE; }
    *count = 1;
    out->pid = 4000 + index_of(device);
    return 0;
}
typedef struct { u32 pid; u64 timestamp; u32 sm, memory, encoder, decoder; } Utilization;
int nvmlDeviceGetProcessUtilization(void *device, Utilization *out, u32 *count, u64 since) {
    if (out == 0 || *count < 1) { *count = 1; return INSUFFICIENT_SIZE; }
    *count = 1;
    out->pid = 4000 + index_of(device);
    out->timestamp = since + 1;
    out->sm = 37;
    return 0;
}

typedef struct { u32 version, supported; } Support;
int nvmlGpmQueryDeviceSupport(void *device, Support *support) { support->supported = index_of(device) == 0; return 0; }
int nvmlGpmSampleAlloc(void **sample) { samples++; *sample = (void *)0x2000; return 0; }
int nvmlGpmSampleFree(void *sample) { (void)sample; samples--; return 0; }
int nvmlGpmSampleGet(void *device, void *sample) { (void)device; (void)sample; return 0; }
typedef struct { u32 id; int result; double value; const char *names[3]; } Metric;
typedef struct { u32 version, count; void *first, *second; Metric metrics[]; } MetricsGet;
int nvmlGpmMetricsGet(MetricsGet *get) {
    if (get->version != 1) return BAD_ARGUMENT;
    for (u32 i = 0; i < get->count; i++) {
        Metric *metric = &get->metrics[i];
        metric->result = 0;
        switch (metric->id) {
        case 1: metric->value = 90.5; break;
        case 2: metric->value = 80.25; break;
        case 3: metric->value = 30; break;
        case 5: metric->value = 0; break;
        case 10: metric->result = NOT_SUPPORTED; break;
        case 20: metric->value = 2; break;
        case 21: metric->value = 3; break;
        default: metric->result = BAD_ARGUMENT;
        }
    }
    return 0;
}
