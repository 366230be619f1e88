/* The few calls of the CUDA driver that tell which GPUs a process is bound to. Its GPUs are those
   that CUDA_VISIBLE_DEVICES names when it is initialised, as with the driver: by UUID, or all. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const all[2] = {"00000000-0000-0000-0000-000000000000",
                                   "11111111-1111-1111-1111-111111111111"};
static int shown[2], count, initialised, active[2];

int cuInit(unsigned flags) {
  const char *named = getenv("CUDA_VISIBLE_DEVICES");
  (void)flags;
  if (initialised) return 0;
  initialised = 1;
  for (int i = 0; i < 2; i++)
    if (!named || strstr(named, all[i])) shown[count++] = i;
  return 0;
}

int cuDeviceGetCount(int *found) {
  *found = count;
  return initialised ? 0 : 3;
}

int cuDevicePrimaryCtxRetain(void *context, int device) {
  (void)context;
  active[device] = 1;
  return 0;
}

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *is_active) {
  *flags = 0;
  *is_active = active[device];
  return 0;
}

int cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
  memset(uuid, 0x11 * shown[device], 16);
  return 0;
}
