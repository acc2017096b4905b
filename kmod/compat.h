/* SPDX-License-Identifier: GPL-2.0 */
/* All that differs between the kernels this builds for: 6.1 to 6.12, tried on both. */
#ifndef DISTFUSE_COMPAT_H
#define DISTFUSE_COMPAT_H

#include <linux/version.h>
#include <linux/fs.h>
#include <linux/file.h>
#include <linux/hrtimer.h>
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/stat.h>

#define DF_KERNEL(a, b)	(LINUX_VERSION_CODE >= KERNEL_VERSION(a, b, 0))

/* 6.3: operations are told of the mount's id mapping by a type of its own. */
#if DF_KERNEL(6, 3)
#define df_idmap	struct mnt_idmap
#else
#define df_idmap	struct user_namespace
#endif

/* 6.6: statx's mask goes along. */
static inline void df_fillattr(df_idmap *idmap, u32 mask, struct inode *inode, struct kstat *stat)
{
#if DF_KERNEL(6, 6)
	generic_fillattr(idmap, mask, inode, stat);
#else
	generic_fillattr(idmap, inode, stat);
#endif
}

/* 6.6 hides the change time behind functions, 6.7 the others; 6.1 got the former with updates. */
static inline struct timespec64 df_mtime(const struct inode *inode)
{
#if DF_KERNEL(6, 7)
	return inode_get_mtime(inode);
#else
	return inode->i_mtime;
#endif
}

static inline struct timespec64 df_ctime(const struct inode *inode)
{
#if DF_KERNEL(6, 7)
	return inode_get_ctime(inode);
#else
	return inode->i_ctime;
#endif
}

static inline void df_set_times(struct inode *inode, struct timespec64 mtime,
				struct timespec64 ctime)
{
#if DF_KERNEL(6, 7)
	inode_set_mtime_to_ts(inode, mtime);
	inode_set_ctime_to_ts(inode, ctime);
#else
	inode->i_mtime = mtime;
	inode->i_ctime = ctime;
#endif
}

static inline void df_set_atime(struct inode *inode, struct timespec64 atime)
{
#if DF_KERNEL(6, 7)
	inode_set_atime_to_ts(inode, atime);
#else
	inode->i_atime = atime;
#endif
}

/* A reference to a file in a list whose lock is held, unless its last one has gone. */
static inline struct file *df_get_live_file(struct file **slot)
{
#if DF_KERNEL(6, 7)
	return get_file_active(slot);
#else
	return get_file_rcu(*slot) ? *slot : NULL;
#endif
}

/* 6.6: a fault may hold the lock of the mapping alone. */
static inline void df_release_fault_lock(struct vm_fault *vmf)
{
#if DF_KERNEL(6, 6)
	release_fault_lock(vmf);
#else
	mmap_read_unlock(vmf->vma->vm_mm);
#endif
}

/* A page of the page cache, with a reference, or NULL. 6.4: what is not there is an error. */
static inline struct folio *df_cached_folio(struct address_space *mapping, pgoff_t index)
{
	struct folio *folio = __filemap_get_folio(mapping, index, 0, 0);

	return IS_ERR(folio) ? NULL : folio;
}

/*
 * The page cache's own way to write, with the inode locked and checked. 6.5, and later versions of
 * 6.1: it moves the position itself.
 */
static inline ssize_t df_perform_write(struct kiocb *iocb, struct iov_iter *from)
{
	loff_t pos = iocb->ki_pos;
	ssize_t ret = generic_perform_write(iocb, from);

	if (ret > 0)
		iocb->ki_pos = pos + ret;
	return ret;
}

/* 6.12: what is written to is a folio. */
#if DF_KERNEL(6, 12)
#define df_written	struct folio
#else
#define df_written	struct page
#endif

/* 6.15: a timer and its function are set up in one. */
static inline void df_timer_setup(struct hrtimer *timer,
				  enum hrtimer_restart (*function)(struct hrtimer *),
				  clockid_t clock)
{
#if DF_KERNEL(6, 15)
	hrtimer_setup(timer, function, clock, HRTIMER_MODE_ABS);
#else
	hrtimer_init(timer, clock, HRTIMER_MODE_ABS);
	timer->function = function;
#endif
}

/* 6.5: splice reads the page cache by itself; before, it goes through read_iter. */
#define DF_SPLICE_OWN	DF_KERNEL(6, 5)

#endif
