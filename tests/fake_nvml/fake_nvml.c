/* A libnvidia-ml.so.1 without a GPU: what it answers stands in a text file that is read again
 * whenever it changes, so that a test can change the machine while it is being watched.
 *
 * FAKE_NVML_STATE names the file; without it every call answers DRIVER_NOT_LOADED. FAKE_NVML_POLL_US
 * is how often, at most, the file is looked at (default: at every call). Lines are "key=value":
 *
 *   driver=580.82.07      init=18                 all=1 (code of every call)
 *   delay_us=500          hang=nvmlDeviceGetUtilizationRates
 *   gpu.0.uuid=GPU-...    gpu.0.util=97           gpu.0.mem_used=1024
 *   gpu.0.error=15        gpu.0.error.nvmlDeviceGetMemoryInfo=3
 *   gpu.0.proc=4242:1048576:C:55                  pid:bytes|NA:C|G|M[:percent of the SMs]
 *   gpu.0.mig=1           gpu.0.mig.0.uuid=MIG-...  gpu.0.mig.0.gi=1  gpu.0.mig.0.proc=...
 *
 * Built with -DDRIVER_470 the library lacks what drivers before 510 lack; with -DDRIVER_535_54 its
 * process records have the longer layout of the drivers 535.43 to 535.85.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6,
       INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, VERSION_MISMATCH = 25 };
enum { GPUS = 16, MIGS = 8, PROCS = 256, ERRORS = 16, TEXT = 96 };

typedef struct { char function[TEXT]; int code; } Fault;
typedef struct { unsigned pid; unsigned long long memory; char kind; int sm; } Proc;
typedef struct Unit {
    int used, parent, slot; /* parent: -1 for a card */
    char uuid[TEXT], name[TEXT], bus[TEXT];
    long long util, mem_total, mem_used, mem_reserved, temp, power, power_limit, sm_clock, reasons;
    long long compute_mode, mig, gi, ci, error;
    int nproc, nfault;
    Proc proc[PROCS];
    Fault fault[ERRORS];
} Unit;
typedef struct { char function[TEXT]; unsigned long long count; } Calls;

static Unit cards[GPUS], instances[GPUS][MIGS];
static char driver[TEXT] = "580.82.07", hang[TEXT];
static long long init_code, all_code, delay_us;
static int refcount;
static Calls calls[128];
static struct timespec state_time, looked_at;
static ino_t state_inode;
static off_t state_size;

static void reset(void) {
    memset(cards, 0, sizeof cards);
    memset(instances, 0, sizeof instances);
    strcpy(driver, "580.82.07");
    hang[0] = 0;
    init_code = all_code = delay_us = 0;
}

static void start_unit(Unit *u, int parent, int slot) {
    if (u->used) return;
    u->used = 1, u->parent = parent, u->slot = slot;
    snprintf(u->uuid, TEXT, parent < 0 ? "GPU-00000000-0000-0000-0000-%012d"
                                       : "MIG-00000000-0000-0000-0000-%012d",
             parent < 0 ? slot : parent * 100 + slot);
    strcpy(u->name, "NVIDIA Fake 80GB");
    snprintf(u->bus, TEXT, "00000000:%02X:00.0", slot + 1);
    u->mem_total = 80LL << 30, u->mem_reserved = 512LL << 20;
    u->temp = 40, u->power = 60000, u->power_limit = 400000, u->sm_clock = 1200;
    u->gi = slot + 1;
}

static void add_proc(Unit *u, const char *value) {
    char memory[32] = "NA", kind = 'C';
    unsigned pid;
    int sm = -1;
    if (u->nproc >= PROCS || sscanf(value, "%u:%31[^:]:%c:%d", &pid, memory, &kind, &sm) < 1) return;
    Proc *p = &u->proc[u->nproc++];
    p->pid = pid, p->kind = kind, p->sm = sm;
    p->memory = strcmp(memory, "NA") ? strtoull(memory, 0, 10) : 0xFFFFFFFFFFFFFFFFULL;
}

static void set_unit(Unit *u, const char *key, const char *value) {
    struct { const char *name; long long *at; } numbers[] = {
        {"util", &u->util}, {"mem_total", &u->mem_total}, {"mem_used", &u->mem_used},
        {"mem_reserved", &u->mem_reserved}, {"temp", &u->temp}, {"power", &u->power},
        {"power_limit", &u->power_limit}, {"sm_clock", &u->sm_clock}, {"reasons", &u->reasons},
        {"compute_mode", &u->compute_mode}, {"mig", &u->mig}, {"gi", &u->gi}, {"ci", &u->ci},
        {"error", &u->error}};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (!strcmp(key, numbers[i].name)) *numbers[i].at = strtoll(value, 0, 0);
    if (!strcmp(key, "uuid")) snprintf(u->uuid, TEXT, "%s", value);
    if (!strcmp(key, "name")) snprintf(u->name, TEXT, "%s", value);
    if (!strcmp(key, "bus")) snprintf(u->bus, TEXT, "%s", value);
    if (!strcmp(key, "proc")) add_proc(u, value);
    if (!strncmp(key, "error.", 6) && u->nfault < ERRORS) {
        Fault *f = &u->fault[u->nfault++];
        snprintf(f->function, TEXT, "%s", key + 6);
        f->code = atoi(value);
    }
}

static void set_key(const char *key, const char *value) {
    int card, slot, end = 0;
    if (sscanf(key, "gpu.%d.mig.%d.%n", &card, &slot, &end) == 2 && end) {
        if (card < 0 || card >= GPUS || slot < 0 || slot >= MIGS) return;
        start_unit(&instances[card][slot], card, slot);
        set_unit(&instances[card][slot], key + end, value);
    } else if (sscanf(key, "gpu.%d.%n", &card, &end) == 1 && end) {
        if (card < 0 || card >= GPUS) return;
        start_unit(&cards[card], -1, card);
        set_unit(&cards[card], key + end, value);
    } else if (!strcmp(key, "driver")) snprintf(driver, TEXT, "%s", value);
    else if (!strcmp(key, "hang")) snprintf(hang, TEXT, "%s", value);
    else if (!strcmp(key, "init")) init_code = atoll(value);
    else if (!strcmp(key, "all")) all_code = atoll(value);
    else if (!strcmp(key, "delay_us")) delay_us = atoll(value);
}

static int load(void) {
    const char *path = getenv("FAKE_NVML_STATE"), *poll = getenv("FAKE_NVML_POLL_US");
    struct stat st;
    if (!path) return DRIVER_NOT_LOADED;
    if (poll) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
        long long us = (now.tv_sec - looked_at.tv_sec) * 1000000LL +
                       (now.tv_nsec - looked_at.tv_nsec) / 1000;
        if (state_inode && us < atoll(poll)) return OK;
        looked_at = now;
    }
    if (stat(path, &st)) return DRIVER_NOT_LOADED;
    if (st.st_ino == state_inode && st.st_size == state_size &&
        !memcmp(&st.st_mtim, &state_time, sizeof state_time)) return OK;
    FILE *file = fopen(path, "r");
    if (!file) return DRIVER_NOT_LOADED;
    char line[512];
    reset();
    while (fgets(line, sizeof line, file)) {
        char *value = strchr(line, '=');
        line[strcspn(line, "\n")] = 0;
        if (line[0] == '#' || !value) continue;
        *value++ = 0;
        set_key(line, value);
    }
    fclose(file);
    state_inode = st.st_ino, state_size = st.st_size, state_time = st.st_mtim;
    return OK;
}

static void count(const char *function) {
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        if (!calls[i].function[0]) snprintf(calls[i].function, TEXT, "%s", function);
        if (!strcmp(calls[i].function, function)) { calls[i].count++; return; }
    }
}

/* How often a function was called since the last reset; "" counts them all; "reset" forgets. */
unsigned long long fake_nvml_calls(const char *function) {
    unsigned long long sum = 0;
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
        if (!*function || !strcmp(function, calls[i].function)) sum += calls[i].count;
    if (!strcmp(function, "reset")) memset(calls, 0, sizeof calls);
    return sum;
}

int fake_nvml_refcount(void) { return refcount; }

/* Everything that each entry does first: the file, the hang, the delay, whether it is initialised. */
static int enter(const char *function, int needs_init) {
    int code = load();
    count(function);
    while (!code && hang[0] && !strncmp(function, hang, strlen(hang))) {
        usleep(5000);
        code = load();
    }
    if (code) return code;
    if (delay_us) usleep((useconds_t)delay_us);
    if (all_code) return (int)all_code;
    return needs_init && !refcount ? UNINITIALIZED : OK;
}

static int fault(const Unit *u, const char *function) {
    if (!u || !u->used) return INVALID_ARGUMENT;
    for (int i = 0; i < u->nfault; i++)
        if (!strncmp(function, u->fault[i].function, strlen(u->fault[i].function)))
            return u->fault[i].code;
    if (u->parent >= 0 && cards[u->parent].error) return (int)cards[u->parent].error;
    return (int)u->error;
}

#define GATE(needs) do { int code_ = enter(__func__, needs); if (code_) return code_; } while (0)
#define DEVICE(u) do { GATE(1); int code_ = fault(u, __func__); if (code_) return code_; } while (0)
#define CARD(u) do { DEVICE(u); if ((u)->parent >= 0) return NOT_SUPPORTED; } while (0)

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    GATE(0);
    if (init_code) return (int)init_code;
    refcount++;
    return OK;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) {
    GATE(1);
    refcount--;
    return OK;
}
const char *nvmlErrorString(int code) {
    switch (code) {
    case 0: return "Success";
    case 1: return "Uninitialized";
    case 3: return "Not Supported";
    case 4: return "Insufficient Permissions";
    case 9: return "Driver Not Loaded";
    case 15: return "GPU is lost";
    case 16: return "GPU requires reset";
    case 18: return "Driver/library version mismatch";
    default: return "Unknown Error";
    }
}
int nvmlSystemGetDriverVersion(char *text, unsigned length) {
    GATE(1);
    snprintf(text, length, "%s", driver);
    return OK;
}
int nvmlSystemGetNVMLVersion(char *text, unsigned length) {
    GATE(0);
    snprintf(text, length, "13.%s", driver);
    return OK;
}
int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    GATE(0);
    *version = 13000;
    return OK;
}
int nvmlSystemGetCudaDriverVersion(int *version) { return nvmlSystemGetCudaDriverVersion_v2(version); }
int nvmlDeviceGetCount_v2(unsigned *n) {
    GATE(1);
    for (*n = 0; *n < GPUS && cards[*n].used; ++*n) {}
    return OK;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, Unit **handle) {
    GATE(1);
    if (index >= GPUS) return INVALID_ARGUMENT;
    int code = fault(&cards[index], __func__);
    if (!code) *handle = &cards[index];
    return code;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, Unit **handle) {
    GATE(1);
    for (int i = 0; i < GPUS; i++) {
        if (cards[i].used && !strcmp(cards[i].uuid, uuid)) { *handle = &cards[i]; return OK; }
        for (int j = 0; j < MIGS; j++)
            if (instances[i][j].used && !strcmp(instances[i][j].uuid, uuid)) {
                *handle = &instances[i][j];
                return OK;
            }
    }
    return NOT_FOUND;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, Unit **handle) {
    GATE(1);
    for (int i = 0; i < GPUS; i++)
        if (cards[i].used && !strcmp(cards[i].bus, bus)) { *handle = &cards[i]; return OK; }
    return NOT_FOUND;
}
int nvmlDeviceGetIndex(Unit *u, unsigned *index) {
    DEVICE(u);
    *index = (unsigned)u->slot;
    return OK;
}
int nvmlDeviceGetUUID(Unit *u, char *text, unsigned length) {
    DEVICE(u);
    snprintf(text, length, "%s", u->uuid);
    return OK;
}
int nvmlDeviceGetName(Unit *u, char *text, unsigned length) {
    DEVICE(u);
    snprintf(text, length, "%s", u->name);
    return OK;
}
typedef struct {
    char legacy[16];
    unsigned domain, bus, device, id, subsystem;
    char busId[32];
} PciInfo;
int nvmlDeviceGetPciInfo_v3(Unit *u, PciInfo *info) {
    CARD(u);
    memset(info, 0, sizeof *info);
    sscanf(u->bus, "%x:%x:%x", &info->domain, &info->bus, &info->device);
    snprintf(info->legacy, 16, "%.12s", u->bus + 4);
    snprintf(info->busId, 32, "%.31s", u->bus);
    return OK;
}
typedef struct { unsigned gpu, memory; } Rates;
int nvmlDeviceGetUtilizationRates(Unit *u, Rates *rates) {
    CARD(u);
    if (u->mig) return NOT_SUPPORTED;
    rates->gpu = (unsigned)u->util, rates->memory = 0;
    return OK;
}
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory2;
int nvmlDeviceGetMemoryInfo(Unit *u, Memory *m) {
    DEVICE(u);
    m->total = (unsigned long long)u->mem_total;
    m->used = (unsigned long long)(u->mem_used + u->mem_reserved);
    m->free = m->total - m->used;
    return OK;
}
#ifndef DRIVER_470
int nvmlDeviceGetMemoryInfo_v2(Unit *u, Memory2 *m) {
    DEVICE(u);
    if (m->version != 0x02000028) return VERSION_MISMATCH;
    m->total = (unsigned long long)u->mem_total, m->reserved = (unsigned long long)u->mem_reserved;
    m->used = (unsigned long long)u->mem_used;
    m->free = m->total - m->reserved - m->used;
    return OK;
}
#endif
int nvmlDeviceGetTemperature(Unit *u, int sensor, unsigned *celsius) {
    CARD(u);
    (void)sensor;
    *celsius = (unsigned)u->temp;
    return OK;
}
int nvmlDeviceGetPowerUsage(Unit *u, unsigned *milliwatts) {
    CARD(u);
    *milliwatts = (unsigned)u->power;
    return OK;
}
int nvmlDeviceGetEnforcedPowerLimit(Unit *u, unsigned *milliwatts) {
    CARD(u);
    *milliwatts = (unsigned)u->power_limit;
    return OK;
}
int nvmlDeviceGetClockInfo(Unit *u, int clock, unsigned *mhz) {
    CARD(u);
    (void)clock;
    *mhz = (unsigned)u->sm_clock;
    return OK;
}
int nvmlDeviceGetCurrentClocksThrottleReasons(Unit *u, unsigned long long *reasons) {
    CARD(u);
    *reasons = (unsigned long long)u->reasons;
    return OK;
}
int nvmlDeviceGetComputeMode(Unit *u, int *mode) {
    DEVICE(u);
    *mode = (int)u->compute_mode;
    return OK;
}
int nvmlDeviceGetPerformanceState(Unit *u, int *state) {
    CARD(u);
    *state = 0;
    return OK;
}
int nvmlDeviceGetPersistenceMode(Unit *u, int *mode) {
    CARD(u);
    *mode = 1;
    return OK;
}
typedef struct {
    unsigned pid;
    unsigned long long memory;
    unsigned gi, ci;
#ifdef DRIVER_535_54
    unsigned long long protected_memory;
#endif
} ProcessInfo;
static int list(Unit *u, char kind, unsigned *n, ProcessInfo *infos) {
    unsigned found = 0, room = *n;
    for (int i = 0; i < u->nproc; i++) {
        if (u->proc[i].kind != kind) continue;
        if (infos && found < room)
            infos[found] = (ProcessInfo){.pid = u->proc[i].pid, .memory = u->proc[i].memory,
                                         .gi = u->parent < 0 ? ~0u : (unsigned)u->gi,
                                         .ci = u->parent < 0 ? ~0u : (unsigned)u->ci};
        found++;
    }
    *n = found;
    return found > room ? INSUFFICIENT_SIZE : OK;
}
#define LIST(name, kind) \
    int name(Unit *u, unsigned *n, ProcessInfo *infos) { DEVICE(u); return list(u, kind, n, infos); }
#ifdef DRIVER_470
LIST(nvmlDeviceGetComputeRunningProcesses_v2, 'C')
LIST(nvmlDeviceGetGraphicsRunningProcesses_v2, 'G')
LIST(nvmlDeviceGetMPSComputeRunningProcesses_v2, 'M')
#else
LIST(nvmlDeviceGetComputeRunningProcesses_v3, 'C')
LIST(nvmlDeviceGetGraphicsRunningProcesses_v3, 'G')
LIST(nvmlDeviceGetMPSComputeRunningProcesses_v3, 'M')
#endif
typedef struct { unsigned pid; unsigned long long stamp; unsigned sm, mem, enc, dec; } Sample;
int nvmlDeviceGetProcessUtilization(Unit *u, Sample *samples, unsigned *n, unsigned long long since) {
    CARD(u);
    unsigned found = 0, room = *n;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    unsigned long long stamp = (unsigned long long)now.tv_sec * 1000000 + (unsigned long long)now.tv_nsec / 1000;
    if (stamp <= since) return NOT_FOUND;
    for (int i = 0; i < u->nproc; i++) {
        if (u->proc[i].sm < 0) continue;
        if (samples && found < room)
            samples[found] = (Sample){.pid = u->proc[i].pid, .stamp = stamp, .sm = (unsigned)u->proc[i].sm};
        found++;
    }
    *n = found;
    if (!found) return NOT_FOUND;
    return found > room || !samples ? INSUFFICIENT_SIZE : OK;
}
int nvmlDeviceGetMigMode(Unit *u, unsigned *current, unsigned *pending) {
    CARD(u);
    int any = u->mig != 0;
    for (int j = 0; j < MIGS; j++) any |= instances[u->slot][j].used;
    if (!any) return NOT_SUPPORTED;
    *current = *pending = u->mig != 0;
    return OK;
}
int nvmlDeviceGetMaxMigDeviceCount(Unit *u, unsigned *n) {
    DEVICE(u);
    *n = u->mig ? MIGS : 0;
    return OK;
}
int nvmlDeviceGetMigDeviceHandleByIndex(Unit *u, unsigned index, Unit **handle) {
    DEVICE(u);
    if (index >= MIGS || !u->mig || !instances[u->slot][index].used) return NOT_FOUND;
    *handle = &instances[u->slot][index];
    return OK;
}
int nvmlDeviceIsMigDeviceHandle(Unit *u, unsigned *is) {
    DEVICE(u);
    *is = u->parent >= 0;
    return OK;
}
int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Unit *u, Unit **card) {
    DEVICE(u);
    if (u->parent < 0) return INVALID_ARGUMENT;
    *card = &cards[u->parent];
    return OK;
}
int nvmlDeviceGetGpuInstanceId(Unit *u, unsigned *id) {
    DEVICE(u);
    if (u->parent < 0) return NOT_SUPPORTED;
    *id = (unsigned)u->gi;
    return OK;
}
int nvmlDeviceGetComputeInstanceId(Unit *u, unsigned *id) {
    DEVICE(u);
    if (u->parent < 0) return NOT_SUPPORTED;
    *id = (unsigned)u->ci;
    return OK;
}
/* What other monitors ask for and this one does not. */
#define UNSUPPORTED(name) int name(Unit *u) { DEVICE(u); return NOT_SUPPORTED; }
UNSUPPORTED(nvmlDeviceGetFanSpeed)
UNSUPPORTED(nvmlDeviceGetNumFans)
UNSUPPORTED(nvmlDeviceGetEncoderUtilization)
UNSUPPORTED(nvmlDeviceGetDecoderUtilization)
UNSUPPORTED(nvmlDeviceGetMaxClockInfo)
UNSUPPORTED(nvmlDeviceGetBAR1MemoryInfo)
UNSUPPORTED(nvmlDeviceGetPcieThroughput)
UNSUPPORTED(nvmlDeviceGetDisplayActive)
UNSUPPORTED(nvmlDeviceGetDisplayMode)
UNSUPPORTED(nvmlDeviceGetTotalEccErrors)
UNSUPPORTED(nvmlDeviceGetPowerManagementLimit)
UNSUPPORTED(nvmlDeviceGetCudaComputeCapability)
UNSUPPORTED(nvmlDeviceGetMemoryBusWidth)
