// SPDX-License-Identifier: GPL-2.0
/*
 * What the first task that enters under a new grant does, before any I/O is done under it: pages
 * of another version are dropped, then size and times are set, for FUSE in write-back mode takes
 * neither from its server.
 */
#include "internal.h"
#include <linux/pagemap.h>
#include <linux/posix_acl.h>
#include <linux/user_namespace.h>

/* Tries of a copy that the daemon may be changing: it has no reason to take long. */
#define DF_READ_TRIES	1000

/* A copy of what the daemon has written into an entry, all of one moment. */
bool df_read_entry(const struct distfuse_entry *entry, struct distfuse_entry *copy)
{
	int tries;
	u32 seq;

	for (tries = 0; tries < DF_READ_TRIES; tries++) {
		/* Pairs with the daemon's release at the end of a change. */
		seq = smp_load_acquire(&entry->seq);
		if (!(seq & 1)) {
			memcpy(copy, entry, sizeof(*copy));
			/* Pairs with the daemon's fence at the beginning of one. */
			smp_rmb();
			if (READ_ONCE(entry->seq) == seq)
				return true;
		}
		cpu_relax();
	}
	return false;
}

static bool df_current(u64 version, const struct distfuse_entry *e)
{
	return version != DF_NO_VERSION && version >= e->since && version <= e->version;
}

static void df_install_data(struct inode *inode, const struct distfuse_entry *e)
{
	struct timespec64 mtime = { .tv_sec = e->mtime, .tv_nsec = min(e->mtime_nsec, 999999999U) };
	struct timespec64 ctime = { .tv_sec = e->ctime, .tv_nsec = min(e->ctime_nsec, 999999999U) };
	loff_t size = min_t(u64, e->size, inode->i_sb->s_maxbytes);
	loff_t old = i_size_read(inode);

	if (old != size) {
		i_size_write(inode, size);
		/*
		 * The last page of a file that grows may have been cut and is zero behind its old
		 * end.
		 */
		if (size < old)
			truncate_pagecache(inode, size);
	}
	df_set_times(inode, mtime, ctime);
}

static void df_install_all(struct df_inode *di, struct inode *inode, const struct distfuse_entry *e)
{
	struct df_att *att = READ_ONCE(di->sb->att);
	struct timespec64 atime = { .tv_sec = e->atime, .tv_nsec = min(e->atime_nsec, 999999999U) };
	umode_t mode = e->mode & 07777;
	kuid_t uid = make_kuid(inode->i_sb->s_user_ns, e->uid);
	kgid_t gid = make_kgid(inode->i_sb->s_user_ns, e->gid);

	if (!uid_valid(uid) || !gid_valid(gid))
		return;
	/* As FUSE does: a server that checks permissions itself has no use for the bit here. */
	if (!att || !(att->flags & DISTFUSE_ATTACH_ACCESS))
		mode &= ~S_ISVTX;
	inode->i_mode = (inode->i_mode & S_IFMT) | mode;
	inode->i_uid = uid;
	inode->i_gid = gid;
	df_set_atime(inode, atime);
	inode->i_blocks = e->blocks;
	/* What has lost its last name does not get one again. */
	if (!e->nlink && inode->i_nlink)
		clear_nlink(inode);
	else if (inode->i_nlink)
		set_nlink(inode, e->nlink);
}

/* With the lease entered, and the inode's install_lock held. */
int df_install(struct df_inode *di, struct distfuse_entry *entry, u32 generation)
{
	struct df_att *att = READ_ONCE(di->sb->att);
	struct inode *inode = di->inode;
	struct distfuse_entry e;
	int ret;

	if (!att)
		return -ENOTCONN;
	if (!df_read_entry(entry, &e))
		return -EAGAIN;
	df_count(att, DISTFUSE_INSTALLS);
	if (df_current(di->version, &e)) {
		df_count(att, DISTFUSE_PAGES_KEPT);
	} else {
		df_count(att, DISTFUSE_PAGES_DROPPED);
		/*
		 * None of the pages is dirty: those were written before the last lease went.
		 * Readahead of that time may still hold pages locked; it is waited for.
		 */
		unmap_mapping_range(inode->i_mapping, 0, 0, 0);
		ret = invalidate_inode_pages2(inode->i_mapping);
		if (ret)
			return ret;
		forget_all_cached_acls(inode);
		di->epoch = atomic64_inc_return(&di->sb->epoch);
	}
	if (S_ISREG(inode->i_mode) && (e.valid & DISTFUSE_ATTR_DATA))
		df_install_data(inode, &e);
	if (e.valid & DISTFUSE_ATTR_ALL)
		df_install_all(di, inode, &e);
	/*
	 * That it has no capabilities may have been found out before another mount gave it some. Of
	 * a file without extended attributes nobody has to find that out, by asking at the first
	 * write.
	 */
	if (e.valid & DISTFUSE_ATTR_XATTRS)
		inode_set_flags(inode, 0, S_NOSEC);
	else if ((e.valid & DISTFUSE_ATTR_ALL) && S_ISREG(inode->i_mode) &&
		 (inode->i_sb->s_flags & SB_NOSEC) && !is_sxid(inode->i_mode))
		inode_set_flags(inode, S_NOSEC, S_NOSEC);
	di->version = e.version;
	/* Opens the fast path: pairs with the acquire in df_enter_fast(). */
	smp_store_release(&di->generation, generation);
	return 0;
}

/*
 * Around what has FUSE set the size by an answer of its server, truncation, where the lease could
 * not be entered. By the time FUSE does it the lease may have been granted anew, with another
 * size: nobody enters meanwhile, and the grant is installed after it.
 */
void df_unsettle(struct df_inode *di, struct df_settling *s)
{
	struct distfuse_entry *entry = df_entry_of(di);

	mutex_lock(&di->install_lock);
	di->unsettled++;
	s->generation = di->generation;
	s->word = entry ? atomic64_read(df_word(entry)) : 0;
	/* Closes the fast path; those who are on it already came before. */
	smp_store_release(&di->generation, 0);
	mutex_unlock(&di->install_lock);
}

void df_settle(struct df_inode *di, const struct df_settling *s)
{
	struct distfuse_entry *entry = df_entry_of(di);
	u64 word = entry ? atomic64_read(df_word(entry)) : 0;

	mutex_lock(&di->install_lock);
	di->unsettled--;
	/*
	 * All the time exclusive: then the inode knows better than the entry, which is of its
	 * beginning.
	 */
	if (!di->unsettled && df_mode(s->word) == DISTFUSE_EXCLUSIVE &&
	    df_mode(word) == DISTFUSE_EXCLUSIVE && df_generation(word) == df_generation(s->word))
		/* Pairs with the acquire in df_enter_fast(). */
		smp_store_release(&di->generation, s->generation);
	mutex_unlock(&di->install_lock);
	wake_up_all(&di->wq);
}
