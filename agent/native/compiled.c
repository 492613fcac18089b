#include "compiled.h"

/* 0 without threads: of many cores, one would be slower than all of torch's. */
int sllm_interface(void)
{
    return GOMP_parallel && omp_get_thread_num && omp_get_num_threads ? INTERFACE : 0;
}
