// SPDX-License-Identifier: GPL-2.0
/* The device /dev/distfuse. */
#include "internal.h"
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

static int df_dev_open(struct inode *inode, struct file *file)
{
	file->private_data = df_att_new();
	return file->private_data ? 0 : -ENOMEM;
}

static int df_dev_release(struct inode *inode, struct file *file)
{
	df_detach(file->private_data);
	return 0;
}

static long df_dev_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct df_att *att = file->private_data;

	switch (cmd) {
	case DISTFUSE_IOC_VERSION:
		return put_user((u32)DISTFUSE_ABI_VERSION, (u32 __user *)arg);
	case DISTFUSE_IOC_ATTACH:
		return df_attach(att, (void __user *)arg);
	case DISTFUSE_IOC_KICK:
		/* Pairs with the release in df_attach_sb(). */
		if (!smp_load_acquire(&att->sb))
			return -ENODEV;
		df_count(att, DISTFUSE_KICKS);
		df_kick(att);
		return 0;
	}
	return -ENOTTY;
}

static int df_dev_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct df_att *att = file->private_data;
	int ret;

	mutex_lock(&df_attach_lock);
	if (!att->map || vma->vm_pgoff || vma->vm_end - vma->vm_start != att->map_size ||
	    !(vma->vm_flags & VM_SHARED))
		ret = -EINVAL;
	else
		ret = remap_vmalloc_range(vma, att->map, 0);
	mutex_unlock(&df_attach_lock);
	return ret;
}

static __poll_t df_dev_poll(struct file *file, struct poll_table_struct *wait)
{
	struct df_att *att = file->private_data;

	poll_wait(file, &att->event_wq, wait);
	/* Pairs with the release in df_attach_sb(); there is nothing to be had before. */
	if (!smp_load_acquire(&att->sb) && !READ_ONCE(att->shared))
		return EPOLLERR;
	return df_poll_events(att);
}

static const struct file_operations df_dev_fops = {
	.owner = THIS_MODULE,
	.open = df_dev_open,
	.release = df_dev_release,
	.unlocked_ioctl = df_dev_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.mmap = df_dev_mmap,
	.poll = df_dev_poll,
	.llseek = noop_llseek,
};

static struct miscdevice df_dev = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = DISTFUSE_DEVICE,
	.fops = &df_dev_fops,
	.mode = 0600,
};

static int __init df_init(void)
{
	int ret;

	BUILD_BUG_ON(sizeof(struct distfuse_entry) != 128);
	BUILD_BUG_ON(DISTFUSE_NR_COUNTERS > DISTFUSE_COUNTERS_STRIDE);
	BUILD_BUG_ON(sizeof(struct distfuse_shared) > PAGE_SIZE);
	df_wq = alloc_workqueue("distfuse", WQ_UNBOUND, 0);
	/* Of its own: flushes wait for a daemon that may be stopped. */
	df_term_wq = alloc_workqueue("distfuse_term", WQ_UNBOUND | WQ_HIGHPRI, 0);
	if (!df_wq || !df_term_wq) {
		ret = -ENOMEM;
		goto queues;
	}
	df_debugfs_init();
	ret = misc_register(&df_dev);
	if (!ret)
		return 0;
	df_debugfs_exit();
queues:
	if (df_term_wq)
		destroy_workqueue(df_term_wq);
	if (df_wq)
		destroy_workqueue(df_wq);
	return ret;
}

/* Not reached while any mount has our tables. */
static void __exit df_exit(void)
{
	misc_deregister(&df_dev);
	destroy_workqueue(df_term_wq);
	destroy_workqueue(df_wq);
	df_debugfs_exit();
	/* Tasks that let go of the last mount may not have left our code yet. */
	synchronize_rcu_tasks();
	rcu_barrier();
}

module_init(df_init);
module_exit(df_exit);

MODULE_DESCRIPTION("Leases shared with a FUSE server: a coherent page cache for DistFUSE");
MODULE_AUTHOR("The DistFUSE authors");
MODULE_LICENSE("GPL");
MODULE_VERSION("1");
