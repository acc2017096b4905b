// SPDX-License-Identifier: GPL-2.0
/* The counters as text: /sys/kernel/debug/distfuse/MOUNT-N. */
#include "internal.h"
#include <linux/debugfs.h>
#include <linux/seq_file.h>

static struct dentry *df_debugfs;

static const char * const df_names[DISTFUSE_NR_COUNTERS] = {
	[DISTFUSE_HITS] = "hits",
	[DISTFUSE_MISSES] = "misses",
	[DISTFUSE_WAITS] = "waits",
	[DISTFUSE_NOWAITS] = "nowaits",
	[DISTFUSE_INSTALLS] = "installs",
	[DISTFUSE_PAGES_KEPT] = "pages_kept",
	[DISTFUSE_PAGES_DROPPED] = "pages_dropped",
	[DISTFUSE_DRAINS] = "drains",
	[DISTFUSE_FLUSHES] = "flushes",
	[DISTFUSE_FLUSHES_DIRTY] = "flushes_dirty",
	[DISTFUSE_UNMAPS] = "unmaps",
	[DISTFUSE_FAULT_RETRIES] = "fault_retries",
	[DISTFUSE_BUFFER_FAULTS] = "buffer_faults",
	[DISTFUSE_WAKEUPS_MADE] = "wakeups_made",
	[DISTFUSE_WAKEUPS_AVOIDED] = "wakeups_avoided",
	[DISTFUSE_KICKS] = "kicks",
	[DISTFUSE_STAT_LOCAL] = "stat_local",
	[DISTFUSE_STAT_REMOTE] = "stat_remote",
	[DISTFUSE_NAME_LOCAL] = "name_local",
	[DISTFUSE_NAME_REMOTE] = "name_remote",
	[DISTFUSE_PERMISSION_LOCAL] = "permission_local",
	[DISTFUSE_EVENTS_DELAYED] = "events_delayed",
	[DISTFUSE_CALLS] = "calls",
	[DISTFUSE_CALLS_AGAIN] = "calls_again",
	[DISTFUSE_SPINS] = "spins",
	[DISTFUSE_SPACE_ASKED] = "space_asked",
	[DISTFUSE_TERM_UNMAPS] = "term_unmaps",
};

static int df_counters_show(struct seq_file *m, void *unused)
{
	struct df_att *att = m->private;
	int which, cpu;

	for (which = 0; which < DISTFUSE_NR_COUNTERS; which++) {
		u64 sum = 0;

		for_each_possible_cpu(cpu)
			sum += READ_ONCE(att->counters[cpu * DISTFUSE_COUNTERS_STRIDE + which]);
		seq_printf(m, "%s %llu\n", df_names[which], sum);
	}
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(df_counters);

void df_debugfs_add(struct df_att *att, const char *name)
{
	static atomic_t number;
	char file[64];

	snprintf(file, sizeof(file), "%s-%d", name, atomic_inc_return(&number));
	att->debugfs = debugfs_create_file(file, 0400, df_debugfs, att, &df_counters_fops);
}

/* Waits for readers, so the attachment outlives them. With df_attach_lock held. */
void df_debugfs_remove(struct df_att *att)
{
	debugfs_remove(att->debugfs);
	att->debugfs = NULL;
}

void df_debugfs_init(void)
{
	df_debugfs = debugfs_create_dir("distfuse", NULL);
}

void df_debugfs_exit(void)
{
	debugfs_remove(df_debugfs);
}
