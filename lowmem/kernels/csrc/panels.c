/* GPTQ's tensors into panels: what rows of words hold for 64 outputs, one row after the other. */
#include <string.h>

#include "lowmem.h"

typedef struct {
    const lm_packed *w;
    char *to[3];
} job;

/* from [rows, out] into to [panels][rows][LM_PANEL], a panel. */
static void copy_panel(const char *from, char *to, int64_t rows, int64_t out, int64_t panel, size_t width)
{
    const int64_t first = panel * LM_PANEL, count = out - first < LM_PANEL ? out - first : LM_PANEL;
    to += (size_t)(panel * rows) * LM_PANEL * width;
    for (int64_t r = 0; r < rows; r++, to += LM_PANEL * width) {
        memcpy(to, from + (size_t)(r * out + first) * width, (size_t)count * width);
        if (count < LM_PANEL)
            memset(to + (size_t)count * width, 0, (size_t)(LM_PANEL - count) * width);
    }
}

static void copy_panels(void *context, lm_team *team)
{
    const job *j = context;
    const lm_packed *w = j->w;
    const int64_t groups = w->in / w->group, panels = (w->out + LM_PANEL - 1) / LM_PANEL;
    for (int64_t panel; (panel = lm_next(team)) < panels;) {
        copy_panel((const char *)w->qweight, j->to[0], w->in * w->bits / 32, w->out, panel, 4);
        copy_panel(w->scales, j->to[1], groups, w->out, panel, w->scales_type == LM_F32 ? 4 : 2);
        if (w->zeros)
            copy_panel((const char *)w->zeros, j->to[2], groups, w->out, panel, 1);
    }
    lm_barrier(team);
}

void lm_to_panels(const lm_packed *w, uint32_t *qweight, void *scales, uint8_t *zeros)
{
    job j = {w, {(char *)qweight, scales, (char *)zeros}};
    lm_run(copy_panels, &j);
}
